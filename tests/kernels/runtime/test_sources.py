"""The text MLX hands to Metal for every variant compiles in each language version MLX asks for."""

from __future__ import annotations

import pytest

from tests import msl
from tests.kernels.variants import capture, variants

VARIANTS = list(variants())


@pytest.mark.parametrize(
    "versions",
    [msl.LANGUAGES[:1], pytest.param(msl.LANGUAGES[1:], marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_generated_text_compiles_in_every_language_version(variant, versions):
    for launch in variant.launch.chain():
        found = capture(launch)
        assert msl.check_languages(found.source, found.name, versions) == dict.fromkeys(
            versions, ()
        )


@pytest.mark.parametrize("variant", VARIANTS[::12], ids=str)
def test_some_texts_compile_in_the_newer_versions(variant):
    found = capture(variant.launch)
    newer = msl.LANGUAGES[1:]
    assert msl.check_languages(found.source, found.name, newer) == dict.fromkeys(newer, ())


def test_a_text_that_needs_a_newer_language_is_found():
    found = capture(VARIANTS[0].launch)
    assert "const F f(p,row*units,i);" in found.source
    newer = found.source.replace(
        "const F f(p,row*units,i);",
        "auto whole = [](uint a, uint b) { return a * b; };\nconst F f(p, whole(row, units), i);",
    )
    errors = msl.check_languages(newer, found.name)
    assert [bool(errors[v]) for v in msl.LANGUAGES] == [True, False, False]


def test_the_variants_are_all_different_programs():
    sources = [capture(v.launch).source for v in VARIANTS]
    assert len(set(sources)) == len(sources)


def test_threadgroups_are_small():
    """How many threads a pipeline can have depends on its registers, which only a Mac knows."""
    for variant in VARIANTS:
        launch = variant.launch
        size = launch.threadgroup[0] * launch.threadgroup[1] * launch.threadgroup[2]
        assert size <= 256, variant
