# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Publishes this repository on the Hugging Face Hub under a name of yours, which replaces the placeholder in its texts.

    python examples/publish.py --repo_id me/muse --also xl modular space --dry_run
    python examples/publish.py --repo_id me/muse --private

`--also` publishes beside it, under its name and an ending:
- `xl`: Storybook in the shape of Stable Diffusion XL, `me/muse-storybook-xl`
- `modular`: the block for Modular Diffusers, `me/muse-modular`
- `space`: the app as a Space, `me/muse-space`
"""

import argparse
import configparser
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi
from huggingface_hub.utils import HfHubHTTPError, validate_repo_id


REPOSITORY = Path(__file__).resolve().parent.parent
PLACEHOLDER = "your-" + "namespace/muse"  # in two parts, or publishing would replace it here too
TEXTS = {".md", ".py"}
SPACE_NEEDS_NOT = (".ci/", "tests/")


def committed_files(repository: Path) -> list[str]:
    """The files that git tracks, by their paths in the repository."""
    command = ["git", "-C", str(repository), "ls-files", "-z"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [name for name in listing.split("\0") if name]


def copy_files(source: Path, names: list[str], folder: Path) -> None:
    """Copies files, named by their paths in `source`, to the same paths in `folder`."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def hub_attributes(repository: Path) -> str:
    """
    `.gitattributes` as the Hub needs it: what is binary here is kept in its large file storage, and a clone without
    these filters would get pointers in place of weights and pictures.
    """
    text = (repository / ".gitattributes").read_text(encoding="utf-8")
    return text.replace(" binary\n", " filter=lfs diff=lfs merge=lfs -text\n")


def requirements(repository: Path, extra: str) -> str:
    """What the package and one of its extras need, as `requirements.txt` says it."""
    setup = configparser.ConfigParser()
    setup.read(repository / "setup.cfg", encoding="utf-8")
    return setup["options"]["install_requires"].lstrip() + setup["options.extras_require"][extra] + "\n"


def version(repository: Path) -> str:
    """The release that this is, by the package's metadata."""
    setup = configparser.ConfigParser()
    setup.read(repository / "setup.cfg", encoding="utf-8")
    return setup["metadata"]["version"]


def stage_whole(repository: Path, folder: Path) -> None:
    """All that git tracks."""
    copy_files(repository, committed_files(repository), folder)


def stage_xl(repository: Path, folder: Path) -> None:
    """Storybook in SDXL's shape, laid out as a checkpoint, with a card of its own."""
    storybook = repository / "examples" / "storybook"
    command = [sys.executable, str(storybook / "assemble_xl.py"), "--output_dir", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    shutil.copyfile(storybook / "xl" / "README.md", folder / "README.md")


def stage_modular(repository: Path, folder: Path) -> None:
    """The block, its index and its card."""
    modular = repository / "modular"
    names = [name for name in committed_files(repository) if name.startswith("modular/")]
    copy_files(modular, [name.removeprefix("modular/") for name in names], folder)


def stage_space(repository: Path, folder: Path) -> None:
    """The app and all it needs, Storybook's weights among it, under the front matter of a Space."""
    names = [name for name in committed_files(repository) if not name.startswith(SPACE_NEEDS_NOT)]
    copy_files(repository, names, folder)
    shutil.copyfile(repository / "docs" / "space.md", folder / "README.md")
    (folder / "requirements.txt").write_text(requirements(repository, "demo"), encoding="utf-8")


class Kind(NamedTuple):
    """What can be published: the ending of its name, how its folder is made, and what the Hub calls it."""

    ending: str
    stage: Callable[[Path, Path], None]
    repo_type: str = "model"
    space_sdk: str | None = None


WHOLE = Kind("", stage_whole)
ALSO = {
    "xl": Kind("-storybook-xl", stage_xl),
    "modular": Kind("-modular", stage_modular),
    "space": Kind("-space", stage_space, repo_type="space", space_sdk="gradio"),
}


def stage(repository: Path, kind: Kind, folder: Path, repo_id: str) -> list[str]:
    """
    Writes into `folder` what is published, with the placeholder replaced.

    Args:
        repository (`Path`): A clone of this repository.
        kind (`Kind`): What to publish.
        folder (`Path`): An empty folder.
        repo_id (`str`): The name of the whole on the Hub, such as `me/muse`.

    Returns:
        `list[str]`: The files, by their paths in `folder`.
    """
    kind.stage(repository, folder)
    (folder / ".gitattributes").write_text(hub_attributes(repository), encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in files:
        if file.suffix in TEXTS:
            text = file.read_bytes()
            file.write_bytes(text.replace(PLACEHOLDER.encode(), repo_id.encode()))
    return [file.relative_to(folder).as_posix() for file in files]


def upload(api: HfApi, kind: Kind, folder: Path, repo_id: str, message: str, private: bool, tag: str) -> str:
    """
    Makes the repository where there is none, and uploads a folder that was staged; the commit gets the tag, unless an
    earlier one has it.

    Returns:
        `str`: The address of the commit.
    """
    where: dict[str, Any] = {"repo_id": repo_id, "repo_type": kind.repo_type}
    api.create_repo(**where, private=private, space_sdk=kind.space_sdk, exist_ok=True)
    # First what says how the others are stored: the Hub goes by what it has when they come
    attributes = folder / ".gitattributes"
    api.upload_file(**where, path_or_fileobj=attributes, path_in_repo=attributes.name, commit_message=message)
    commit = api.upload_folder(**where, folder_path=folder, commit_message=message)
    api.create_tag(**where, tag=tag, exist_ok=True)
    return commit.commit_url


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo_id", required=True, help="the name on the Hub, such as me/muse")
    parser.add_argument("--also", nargs="+", choices=list(ALSO), default=[], help="what else to publish")
    parser.add_argument("--private", action="store_true", help="make new repositories private")
    parser.add_argument("--message", default="Publish MUSE", help="of the commits")
    parser.add_argument("--dry_run", action="store_true", help="only say what would be uploaded")
    args = parser.parse_args()
    try:
        validate_repo_id(args.repo_id)
    except ValueError as error:
        parser.error(f"--repo_id: {error}")
    if "/" not in args.repo_id or args.repo_id == PLACEHOLDER:
        parser.error("--repo_id has to name a namespace of yours, such as me/muse")
    return args


def main() -> None:
    args = parse_args()
    tag = f"v{version(REPOSITORY)}"
    for kind in (WHOLE, *(ALSO[name] for name in args.also)):
        repo_id = args.repo_id + kind.ending
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            files = stage(REPOSITORY, kind, folder, args.repo_id)
            sizes = [(folder / file).stat().st_size for file in files]
            if args.dry_run:
                for file, size in zip(files, sizes):
                    print(f"{size:>10,}  {file}")
                print(f"{kind.repo_type} {repo_id} {tag}: {len(files)} files, {sum(sizes) / 1e6:.1f} MB\n")
                continue
            try:
                print(upload(HfApi(), kind, folder, repo_id, args.message, args.private, tag))
            except HfHubHTTPError as error:
                sys.exit(f"{repo_id}: {error}")


if __name__ == "__main__":
    main()
