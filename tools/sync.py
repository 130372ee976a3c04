"""Same name, same code: finds and repairs differences between the training scripts.

    python tools/sync.py --check
    python tools/sync.py train publish --from train_text_to_image.py

Every top-level function, class and constant of a script stands in one of the three sets below.
"""

import argparse
import ast
import builtins
import difflib
import functools
import symtable
import sys
from pathlib import Path


# The same text wherever the name stands; it refers to shared names, hooks, imports and builtins only.
SHARED = {
    "DEEPFLOYD",
    "PICTURES",
    "VALIDATION_STEPS",
    "VALIDATION_DRAWS",
    "SMALL_SET",
    "UNSAVED",
    "STOP_SIGNALS",
    "bounded",
    "positive_int",
    "positive_float",
    "natural_int",
    "non_negative",
    "fraction",
    "below_one",
    "switch",
    "REPLACES",
    "lies_in",
    "base_problems",
    "PIPELINES",
    "TEXT_ENCODERS",
    "HelpFormatter",
    "read_config",
    "add_saving_flags",
    "add_prior_flags",
    "digest",
    "read_metadata",
    "list_files",
    "read_folder",
    "read_rows",
    "caption_list",
    "class_pictures",
    "missing_class_pictures",
    "draw_class_pictures",
    "fill_class_pictures",
    "read_bytes",
    "open_image",
    "check_record",
    "stamp",
    "read_manifest",
    "check_records",
    "split_records",
    "permutation",
    "step_keys",
    "paired_keys",
    "Samples",
    "weights_digest",
    "open_pipeline",
    "load_pipeline",
    "set_schedule",
    "base_code",
    "may_be_model",
    "NOISE_ALONE",
    "PADDED",
    "in_float32",
    "name_parts",
    "encode_pixels",
    "encode_prompts",
    "cache_folder",
    "replace_file",
    "fill_entry",
    "fill_cache",
    "encode_batch",
    "snr_weights",
    "validation_keys",
    "log_validation",
    "log_row",
    "log_steps",
    "StopFlag",
    "ignore_signals",
    "agree",
    "write_checkpoint",
    "numbered_checkpoints",
    "is_whole",
    "flush",
    "seal_checkpoint",
    "save_checkpoint",
    "find_checkpoint",
    "begin_run",
    "check_resumed",
    "load_checkpoint",
    "write_model_card",
    "with_retries",
    "open_repository",
    "publish",
    "make_accelerator",
    "total_batch_size",
    "prepare_unet",
    "make_optimizer",
    "start_logging",
    "print_header",
    "peak_memory",
    "load_batches",
    "train",
    "main",
}
# The same signature, a body of its own: what makes the method.
HOOKS = {
    "REFUSED",
    "PUBLISHED",
    "CARD",
    "parse_args",
    "check_args",
    "read_records",
    "load_models",
    "compute_loss",
    "picture_prompts",
    "sample_picture",
    "weights_to_save",
    "after_step",
    "save_weights",
    "load_weights",
    "save_model",
    "loading_code",
    "prepare_training",
    "run",
}
# Names of one script only: {"train_lora.py": {"name", ...}, ...}
PRIVATE = {
    "train_text_to_image.py": {"BIASED"},
    "train_lora.py": {"TARGETS", "WAYS", "truth", "yes_or_no", "file_key", "SGM", "sgm_name", "save_kohya"},
    "textual_inversion.py": {"CAPTIONS", "word_tokens", "captions_of", "Embeddings", "learned_embeds"},
    "train_unconditional.py": {"NEW_UNET", "load_base", "new_unet"},
}

ROOT = Path(__file__).resolve().parent.parent


def find_scripts(folder: Path = ROOT) -> list[Path]:
    """The training scripts: every Python file at the top of the folder."""
    return sorted(folder.glob("*.py"))


def names_of(node: ast.stmt) -> list[str]:
    """The names that a top-level statement defines, imports aside; what the entry guard assigns is not counted."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
        return []
    stores = (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    inner = (n for n in ast.walk(node) if isinstance(n, (ast.FunctionDef, ast.ClassDef)))
    return sorted({n.id for n in stores} | {n.name for n in inner})


@functools.cache
def definitions(source: str) -> dict[str, tuple[ast.stmt, int, int]]:
    """name -> (statement, first line, line after the last), decorators and the comment directly above included."""
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while first > 0 and lines[first - 1].startswith("#"):
            first -= 1
        found.update((name, (node, first, node.end_lineno)) for name in names_of(node))
    return found


def text_of(source: str, name: str) -> str:
    """The source text of one definition."""
    _, first, end = definitions(source)[name]
    return "\n".join(source.splitlines()[first:end]) + "\n"


def signature(node: ast.stmt) -> str:
    """What all bodies of a hook have in common: a function's arguments and annotations, a class's bases."""
    if isinstance(node, ast.FunctionDef):
        return f"def ({ast.unparse(node.args)}) -> {node.returns and ast.unparse(node.returns)}"
    if isinstance(node, ast.ClassDef):
        return f"class ({', '.join(map(ast.unparse, node.bases))})"
    return "constant"


def references(text: str) -> set[str]:
    """The module-level names that a definition's text refers to."""

    def visit(table):
        own = {s.get_name() for s in table.get_symbols() if s.is_referenced()}
        if table.get_type() != "module":
            own = {name for name in own if table.lookup(name).is_global()}
        return own.union(*map(visit, table.get_children()))

    return visit(symtable.symtable(text, "definition", "exec"))


def imports(source: str) -> set[str]:
    """The names that a script's top-level imports bind."""
    nodes = (
        n for s in ast.parse(source).body if not isinstance(s, (ast.FunctionDef, ast.ClassDef)) for n in ast.walk(s)
    )
    aliases = (a for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names)
    return {a.asname or a.name.split(".")[0] for a in aliases}


def problems(scripts: dict[str, str]) -> list[str]:
    """Everything that breaks the rules, in words; scripts maps file names to sources."""
    found = []
    defined = {script: definitions(source) for script, source in scripts.items()}
    first_with = {}
    for script, source in scripts.items():
        private = PRIVATE.get(script, set())
        known = set(defined[script]) & (SHARED | HOOKS) | imports(source) | set(dir(builtins)) | {"__file__"}
        for name, (node, _, _) in defined[script].items():
            if (name in SHARED) + (name in HOOKS) + (name in private) != 1:
                found.append(f"{script}: {name} must stand in exactly one set of tools/sync.py")
            origin = first_with.setdefault(name, script)
            if name in private and origin != script:
                found.append(f"{script}: {name} is private, but stands in {origin} too")
            if name in SHARED:
                ours, theirs = text_of(scripts[origin], name), text_of(source, name)
                diff = difflib.unified_diff(ours.splitlines(), theirs.splitlines(), origin, script, lineterm="", n=1)
                if ours != theirs:
                    found.append("\n".join([f"{script}: {name} differs", *diff]))
                for other in sorted(references(theirs) - known - {name}):
                    found.append(f"{script}: {name} refers to {other}, which is neither shared, a hook nor imported")
            if name in HOOKS and signature(node) != signature(defined[origin][name][0]):
                found.append(f"{script}: {name} has another signature than in {origin}")
    for name in sorted((SHARED | HOOKS) - set(first_with)):
        found.append(f"{name} stands in a set of tools/sync.py and in no script")
    for script, names in PRIVATE.items():
        for name in sorted(names - set(defined.get(script, {}))):
            found.append(f"{name} is declared private to {script}, which does not define it")
    return found


def copy_names(names: list[str], origin: Path) -> None:
    """Copy shared definitions from one script into every script beside it that has them."""
    for name in names:
        if name not in SHARED:
            sys.exit(f"{name} is not a shared name.")
        if name not in definitions(origin.read_text()):
            sys.exit(f"{origin.name} does not define {name}.")
        for path in find_scripts(origin.parent):
            source = path.read_text()
            if name in definitions(source):
                _, first, end = definitions(source)[name]
                lines = source.splitlines(keepends=True)
                path.write_text("".join([*lines[:first], text_of(origin.read_text(), name), *lines[end:]]))


def main() -> None:
    """Print the differences (--check), or copy the named definitions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="shared names to copy")
    parser.add_argument("--from", dest="origin", type=Path, help="the script to copy from")
    parser.add_argument("--check", action="store_true", help="print what breaks the rules; exit 1 if anything does")
    args = parser.parse_args()
    if args.check == bool(args.names) or bool(args.names) != bool(args.origin):
        parser.error("give --check, or names and --from SCRIPT")
    if args.names:
        copy_names(args.names, ROOT / args.origin.name)
    found = problems({path.name: path.read_text() for path in find_scripts()}) if args.check else []
    print("\n".join(found), end="\n" if found else "")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
