# Copyright 2026 The MUSE pipelines authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Publishes this repository on the Hugging Face Hub under a name of yours, which replaces the placeholder in its texts.

python examples/publish.py --repo_id me/muse --dry_run
python examples/publish.py --repo_id me/muse --private
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id


REPOSITORY = Path(__file__).resolve().parent.parent
PLACEHOLDER = "your-" + "namespace/muse"  # in two parts, or publishing would replace it here too
TEXTS = {".md", ".py"}


def committed_files(repository: Path) -> list[Path]:
    """The files that git tracks, relative to the repository."""
    command = ["git", "-C", str(repository), "ls-files", "-z"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [Path(name) for name in listing.split("\0") if name]


def stage(repository: Path, folder: Path, repo_id: str) -> list[Path]:
    """
    Copies what git tracks into `folder`, with the placeholder replaced.

    Args:
        repository (`Path`): A clone of this repository.
        folder (`Path`): Where to copy to.
        repo_id (`str`): The name on the Hub, such as `me/muse`.

    Returns:
        `list[Path]`: The files, relative to `folder`.
    """
    files = committed_files(repository)
    for file in files:
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix in TEXTS:
            text = (repository / file).read_text(encoding="utf-8")
            target.write_text(text.replace(PLACEHOLDER, repo_id), encoding="utf-8")
        else:
            shutil.copyfile(repository / file, target)
    return files


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo_id", required=True, help="the name on the Hub, such as me/muse")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--message", default="Publish MUSE", help="of the commit")
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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = stage(REPOSITORY, folder, args.repo_id)
        size = sum((folder / file).stat().st_size for file in files)
        if args.dry_run:
            for file in files:
                print(f"{(folder / file).stat().st_size:>10,}  {file}")
            print(f"create_repo({args.repo_id!r}), upload_folder: {len(files)} files, {size / 1e6:.1f} MB")
            return
        api = HfApi()
        api.create_repo(args.repo_id, private=args.private, exist_ok=True)
        commit = api.upload_folder(repo_id=args.repo_id, folder_path=folder, commit_message=args.message)
    print(commit.commit_url)


if __name__ == "__main__":
    main()
