"""`pipeline_muse_xl.py` repeats what it shares with `pipeline_muse.py`, and nothing else is written twice."""

import ast
import subprocess
import sys

import fix_copies
import pytest
from fix_copies import fixed, marked, pieces, rename


ORIGINAL, COPY = (path.read_text(encoding="utf-8") for path in (fix_copies.ORIGINAL, fix_copies.COPY))

# What differs, and only that: conditioning, decoding, defaults.
DIFFERENT = {
    "MusePipelineOutput",
    "MusePipeline",
    "MusePipeline.model_cpu_offload_seq",
    "MusePipeline._callback_tensor_inputs",
    "MusePipeline.presets",
    "MusePipeline.__init__",
    "MusePipeline._default_size",
    "MusePipeline._scale_latents",
    "MusePipeline._unscale_latents",
    "MusePipeline._decode_output",
    "MusePipeline._encode_conditioning",
    "MusePipeline._check_conditioning",
    "MusePipeline._most_clip_skip",
    "MusePipeline.invert",
    "MusePipeline.__call__",
}
ONLY_XL = {"latents_statistics", "upcast", "MuseXLPipelineOutput", "MuseXLPipeline"}
ONLY_XL |= {"MuseXLPipeline._time_ids"}


def syntax(node: ast.stmt, replacements: str | None = None) -> str:
    return ast.dump(ast.parse(rename(ast.unparse(node), replacements)))


def test_every_copy_has_the_syntax_of_its_original():
    originals = pieces(ORIGINAL)
    copies = list(marked(COPY))
    assert len(copies) > 80
    for piece, name, replacements in copies:
        assert syntax(piece.node) == syntax(originals[name].node, replacements), name
        assert piece.name == rename(name, "MusePipeline->MuseXLPipeline")


def test_what_is_not_marked_is_what_differs():
    """Methods of a class that is copied whole are in its copy."""
    originals = {piece.name for piece in pieces(ORIGINAL).values()}
    names = {name for _, name, _ in marked(COPY)}
    whole = {name for name in originals if name.partition(".")[0] in names}
    assert originals - names - whole - {"logger"} == DIFFERENT
    ours = {piece.name for piece in pieces(COPY).values()} - {piece.name for piece, _, _ in marked(COPY)}
    whole = {name for name in ours if name.partition(".")[0] in names}
    renamed = {name.replace("MusePipeline", "MuseXLPipeline") for name in DIFFERENT}
    assert ours - whole - renamed - {"logger"} == ONLY_XL - renamed


def test_what_differs_does_differ():
    originals, copies = pieces(ORIGINAL), pieces(COPY)
    replacements = "MusePipeline->MuseXLPipeline, StableDiffusionPipeline->StableDiffusionXLPipeline"
    for name in DIFFERENT:
        copy = copies[name.replace("MusePipeline", "MuseXLPipeline")]
        assert syntax(copy.node) != syntax(originals[name].node, replacements), name


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("cross_entropy).sum(dim=-1)", "cross_entropy).mean(dim=-1)"),
        lambda text: text.replace("START_JITTER = 0.1", "START_JITTER = 0.2"),
        lambda text: text.replace("    best: dict[int, Iterate]", "    # and more\n    best: dict[int, Iterate]"),
    ],
    ids=["function", "constant", "comment"],
)
def test_fixing_writes_the_copies_anew(change):
    assert fixed(COPY, ORIGINAL) == COPY
    broken = change(COPY)
    assert broken != COPY and fixed(broken, ORIGINAL) == COPY


def test_names_are_replaced_as_the_mark_says():
    original = "class A:\n    def f(self) -> 'A':\n        return A(AB, BA)\n"
    copy = "class B:\n    # Copied from pipeline_muse.A.f with A->B\n    def f(self):\n        pass\n"
    assert fixed(copy, original) == copy.replace("(self):\n        pass", "(self) -> 'B':\n        return B(BB, BA)")


@pytest.mark.parametrize(
    "copy, message",
    [
        ("# Copied from pipeline_muse.g\ndef g(): pass\n", "no 'g'"),
        ("# Copied from pipeline_muse.f\n\ndef f(): pass\n", "Line 1"),
    ],
)
def test_marks_that_lead_nowhere_are_reported(copy, message):
    with pytest.raises(ValueError, match=message):
        fixed(copy, "def f(): pass\n")


def test_the_check_passes_from_the_command_line():
    command = [sys.executable, fix_copies.__file__, "--check"]
    assert subprocess.run(command, capture_output=True).returncode == 0
