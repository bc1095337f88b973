from ._kernel import counts, fallbacks, launches, summary, unavailable

__all__ = ["counts", "fallbacks", "launches", "summary", "unavailable"]
