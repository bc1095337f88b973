from ._kernel import counts, fallbacks, launches, summary, unavailable, wanted

__all__ = ["counts", "fallbacks", "launches", "summary", "unavailable", "wanted"]
