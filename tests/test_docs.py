"""What the README and docs/ say to type is read by the real commands, and their files are files."""

import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

from lineage_jax import cli
from lineage_jax.cli import milestones, models, scaling, terminal, training
from lineage_jax.lineage import LINEAGE
from lineage_jax.pods import CHIPS

ROOT = pathlib.Path(__file__).parent.parent
PARITY = ROOT / "docs" / "parity.md"  # which a test run writes
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").iterdir()} - {PARITY})
ENDS = {"&&", "||", "|", ";", ";;"}


def blocks(page):
    """(language, text) of every block of code: fenced, or indented by four; a YAML file is one."""
    text = page.read_text()
    if page.suffix == ".yaml":
        return [("yaml", text)]
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    bare = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*fenced, *(("", line) for line in re.findall(r"^ {4}(\S.*)$", bare, re.MULTILINE))]


def strings(value):
    """All strings in what a YAML file says; a command and its arguments are one."""
    if isinstance(value, dict):
        if "command" in value:
            yield shlex.join([*value["command"], *value.get("args", [])])
        for one in value.values():
            yield from strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from strings(one)
    elif isinstance(value, str):
        yield value


def commands(text):
    """The arguments of every `lineage ...` in lines of a shell, in quoted ones too."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for i, word in enumerate(words):
            if word == "lineage" or word.endswith("/lineage"):
                rest = [*words[i + 1 :], ";"]
                end = next(n for n, one in enumerate(rest) if one in ENDS)
                if rest[0] in COMMANDS:
                    yield rest[:end]
            elif "lineage " in word:
                yield from commands(re.sub(r"^[\w-]+=", "", word))


COMMANDS = (
    "list",
    "show",
    "train",
    "runs",
    "plan",
    "sweep",
    "plan-sweep",
    "fit",
    "optimal",
    "launch",
)


def written():
    """(page, arguments) of every command."""
    for page in PAGES:
        for language, text in blocks(page):
            texts = strings(yaml.safe_load(text)) if language == "yaml" else [text]
            for one in texts:
                yield from ((page.name, words) for words in commands(one))


WRITTEN = list(written())


def test_every_page_has_commands_and_every_command_is_on_a_page():
    assert {page for page, _ in WRITTEN} == {page.name for page in PAGES}
    assert {words[0] for _, words in WRITTEN} >= set(COMMANDS) - {"list", "show"}


@pytest.mark.parametrize(
    ("page", "words"), WRITTEN, ids=[f"{p}: {' '.join(w)}" for p, w in WRITTEN]
)
def test_a_command_that_is_written_is_read(page, words, monkeypatch, capsys):
    """Up to where the options are known, and no further."""
    read = terminal.options

    class Read(Exception):
        """The options are known."""

    def stop(*arguments):
        read(*arguments)
        raise Read

    for group in (milestones, models, scaling, training):
        monkeypatch.setattr(group, "options", stop)
    monkeypatch.setattr(terminal, "options", stop)  # what `of_a_fit` calls
    if words[0] in ("list", "show"):
        cli.main(words)
    else:
        with pytest.raises(Read):
            cli.main(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_scripts_have_no_syntax_errors(page):
    for language, text in blocks(page):
        if language == "bash":
            subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_a_slice_has_as_many_chips_as_its_pods_and_its_mesh():
    (text,) = (text for language, text in blocks(ROOT / "docs" / "gke.md") if language == "yaml")
    job = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    x, y, z = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"] * job["completions"]
    assert x * y * z == chips == 64
    assert f"--mesh.fsdp={chips}" in container["args"]
    assert job["completions"] == job["parallelism"]
    (flags,) = (one["value"] for one in container["env"] if one["name"] == "LIBTPU_INIT_ARGS")
    assert set(flags.split()) <= set(CHIPS["v5p"].flags)


def test_the_exit_code_that_asks_to_be_run_again_is_the_one_that_training_has():
    from lineage_jax.train.loop import EXIT_PREEMPTED

    for name in ("cloud_tpu.md", "gke.md", "slurm.md", "skypilot.yaml"):
        assert str(EXIT_PREEMPTED) in (ROOT / "docs" / name).read_text()


def test_every_link_between_pages_leads_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?://|#)([^)]+)\)", page.read_text()):
            assert (page.parent / link.split("#")[0]).exists(), f"{page.name}: {link}"


def test_every_milestone_is_on_the_page_of_parity():
    lines = PARITY.read_text().splitlines()
    systems = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    assert set(systems) >= {one.name for one in LINEAGE}
