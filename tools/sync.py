"""Finds and mends fences that differ: what stands between a fence's two lines is the same text in every script.

    python tools/sync.py                                    prints which fences differ, and where
    python tools/sync.py Engine train_text_to_image.py      copies that script's fence into the others that have it

A fence begins with `# === Title: a few words ===` and ends with `# === End of title ===`.
"""

import argparse
import difflib
import re
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"# === (?P<end>End of )?(?P<title>[^:]+?)(: .+)? ===")


def find_scripts(folder: Path = ROOT) -> list[Path]:
    """The training scripts: every Python file at the top of the folder that has fences."""
    return sorted(path for path in folder.glob("*.py") if find_fences(path.read_text()))


def find_fences(source: str) -> dict[str, tuple[int, int]]:
    """The fences of a script by their titles: the numbers of their first and last lines, counted from 0.

    A fence that stands in another, is not closed, or closes under another title is a ValueError.
    """
    fences, title, first = {}, None, 0
    for number, line in enumerate(source.splitlines()):
        mark = MARK.fullmatch(line)
        if mark and not mark["end"]:
            if title or mark["title"] in fences:
                raise ValueError(f"line {number + 1}: {mark['title']} begins in {title or 'a second place'}")
            title, first = mark["title"], number
        elif mark:
            if title is None or mark["title"] != title.lower():
                raise ValueError(f"line {number + 1}: {mark['title']} ends where {title} is open")
            fences[title], title = (first, number), None
    if title:
        raise ValueError(f"{title} does not end")
    return fences


def fence_text(source: str, title: str) -> str:
    """The text of a fence, both marks included."""
    first, last = find_fences(source)[title]
    return "".join(source.splitlines(keepends=True)[first : last + 1])


def differences(scripts: dict[str, str]) -> list[str]:
    """What differs between the fences of some scripts (sources by names): a diff for each copy unlike the first."""
    firsts, found = {}, []
    for name, source in scripts.items():
        for title in find_fences(source):
            text = fence_text(source, title)
            origin, original = firsts.setdefault(title, (name, text))
            if text != original:
                lines = original.splitlines(), text.splitlines()
                diff = difflib.unified_diff(*lines, origin, name, lineterm="", n=1)
                found.append("\n".join([f"{title} differs:", *diff]))
    return found


def copy_fence(title: str, origin: Path) -> list[Path]:
    """Copies a fence from one script into every script beside it that has it; returns those that have changed."""
    text, changed = fence_text(origin.read_text(), title), []
    for path in find_scripts(origin.parent):
        source = path.read_text()
        if title in find_fences(source) and fence_text(source, title) != text:
            first, last = find_fences(source)[title]
            lines = source.splitlines(keepends=True)
            path.write_text("".join([*lines[:first], text, *lines[last + 1 :]]))
            changed.append(path)
    return changed


def main() -> None:
    """Prints the differences, and exits with 1 if there are any; or copies a fence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("title", nargs="?", help="a fence's title")
    parser.add_argument("script", nargs="?", type=Path, help="the script to copy it from")
    args = parser.parse_args()
    if args.title and not args.script:
        parser.error("name the script to copy the fence from")
    if args.title:
        titles = find_fences(args.script.read_text())
        if args.title not in titles:
            parser.error(f"{args.script} has no fence {args.title!r}, but {', '.join(titles)}")
        for path in copy_fence(args.title, args.script.resolve()):
            print(f"{path.name} has changed")
    else:
        found = differences({path.name: path.read_text() for path in find_scripts()})
        print("\n".join(found) or "All fences are alike.")
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
