"""OLMo."""

from tests.models.case import Case

POST_NORMS = {"attn_norm": None, "ffn_norm": None}

CASES = {
    "olmo2": Case("olmo2", untied=True, wide_norms=True, post_norms=True, extra=POST_NORMS),
}
