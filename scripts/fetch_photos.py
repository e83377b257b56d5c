"""Fetch the photographs that scenes can be made of (`cutouts: photos`): things to cut out, and landscapes behind them.

They lie in two packages of Debian, 231 MB, of which the files that `scenes/kinds.json` names are kept, 19 MB, with the
packages' licences. The folder appears under its final name only when it is complete. Needs nothing but apt and dpkg.

Usage: python scripts/fetch_photos.py [FOLDER]
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

KINDS = Path(__file__).parents[1] / "src" / "sparsight" / "scenes" / "kinds.json"
STAMPS, LAND = "tuxpaint-stamps-default", "endless-sky-data"
FOLDERS = {STAMPS: "usr/share/tuxpaint/stamps", LAND: "usr/share/games/endless-sky/images/land"}


def wanted() -> dict[str, list[str]]:
    """Package -> the files of its folder that scenes show."""
    listed = json.loads(KINDS.read_text(encoding="utf-8"))
    kinds = {group.partition(" ")[2]: images for group, *images in listed["photos"].values()}
    return {
        STAMPS: [f"{folder}/{image}.png" for folder, images in kinds.items() for image in images],
        LAND: [f"{name}.jpg" for names in listed["landscapes"].values() for name in names],
    }


def unpack(package: str, beside: Path) -> Path:
    """Download and unpack a package into `beside`; the folder that it lies in now."""
    made = beside / package
    made.mkdir()
    for command in (["apt-get", "-qq", "download", package], ["dpkg-deb", "-x", f"{package}_*.deb", package]):
        found = [str(*beside.glob(part)) if "*" in part else part for part in command]
        done = subprocess.run(found, cwd=beside, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"photos: {' '.join(found)} failed:\n{done.stderr}Try `apt-get update` first.")
    return made


def copy(unpacked: Path, package: str, names: list[str], folder: Path) -> None:
    """Copy the named files of an unpacked package, and its licence, into `folder`."""
    source, target = unpacked / FOLDERS[package], folder / ("stamps" if package == STAMPS else "land")
    if lacking := [name for name in names if not (source / name).is_file()]:
        raise SystemExit(
            f"photos: {package} of this system lacks {len(lacking)} of {len(names)} files, such as {lacking[0]}; "
            "expected that of Debian 12 (2022.06.04, and 0.9.8)"
        )
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, target / name)
    shutil.copy(unpacked / "usr/share/doc" / package / "copyright", folder / f"{package}.copyright")


def main(folder: Path) -> None:
    """Make the folder, if it is not there with all that is wanted."""
    files = wanted()
    inside = {STAMPS: folder / "stamps", LAND: folder / "land"}
    if all((inside[package] / name).is_file() for package, names in files.items() for name in names):
        return
    if lacking := [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]:
        raise SystemExit(f"photos: {lacking[0]} is not installed here, so scenes stay of emoji or shapes")
    print(f"photos: fetching {' and '.join(files)} (231 MB)", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".photos-") as beside:
        ready = Path(beside, "ready")
        ready.mkdir()
        for package, names in files.items():
            copy(unpack(package, Path(beside)), package, names, ready)
        versions = "".join(sorted(f"{file.name}\n" for file in Path(beside).glob("*.deb")))
        (ready / "packages.txt").write_text(versions, encoding="utf-8")
        if folder.exists():
            folder.rename(Path(beside, "old"))
        ready.rename(folder)
    print(f"photos: {sum(map(len, files.values()))} photographs are in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "assets/photos").absolute())  # as dpkg-deb runs elsewhere
