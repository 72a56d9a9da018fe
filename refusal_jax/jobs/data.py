"""Downloads the public prompt sets, and makes the paper's splits from them.

  refusal-jax data list                                  # the sets, their licences, and which are here
  refusal-jax data fetch                                 # all prompt sets (26 MB), checked by hash; then the splits
  refusal-jax data fetch --sets=xstest,pile --accept_new_hash
  refusal-jax data fetch --from=DIR --alpaca=FILE        # from files that are on the disk; no network is used
  refusal-jax data verify                                # checks what is here; exit code 2 if something is not right

A study then takes `--config.data.harmful_train=paper` (the paper's split), `--config.data.harmful_test=jailbreakbench`
(a set by its name), or any file. Downloads resume, appear only when complete, and take proxies from the environment
(HTTPS_PROXY). The folder receives raw/ (as published), prompts/ (each set as a list of prompts), splits/ (the paper's
six), loss/ (the texts that the paper measures the loss on: `--config.loss.text_files="('pile',)"
--config.loss.chat_files="('alpaca',)"`) and answers/ (questions with correct answers, which `refusal-jax damage
--answers.sets=gsm8k,mbpp` reads).

The sets belong to their authors and are not part of this package; respect their licences (Alpaca is not for commercial
use). Of the Pile, `--sets=pile` streams only the first 4,096 documents from the Hub, which the loss needs.
"""

import pathlib

from absl import flags

from refusal_jax.data.prompts import data_folder
from refusal_jax.data.public import MANIFEST, build, expected, fetch_set, load_manifest, status, take_files
from refusal_jax.errors import UserError
from refusal_jax.files import local_path

ACTIONS = {"fetch": 0, "list": 0, "verify": 0}
SETS = flags.DEFINE_list(
    "sets",
    [],
    "Names of the sets to fetch. Default: all files whose hashes are known, and with --accept_new_hash all files.",
)
FROM = flags.DEFINE_string(
    "from", None, "Folder with files downloaded by other means, named as `refusal-jax data list` shows."
)
ALPACA = flags.DEFINE_string("alpaca", None, "Alpaca's file for the harmless splits: .json, .jsonl or .parquet.")
FOLDER = flags.DEFINE_string(
    "folder", None, "Folder that data is kept in. Default: refusal_jax/data in the user's cache."
)
ACCEPT = flags.DEFINE_bool("accept_new_hash", False, "Accept files whose hash is not known, and record their hashes.")
MANIFEST_FILE = flags.DEFINE_string(
    "manifest", str(MANIFEST), "Manifest to use instead, in the same format, for example that of a mirror."
)


def main(arguments) -> None:
    action = arguments[0] if arguments else ""
    if not action:
        raise UserError(f"data needs an action: {', '.join(ACTIONS)}. Start with `refusal-jax data list`.")
    manifest = load_manifest(local_path(MANIFEST_FILE.value))
    folder = local_path(FOLDER.value) if FOLDER.value else data_folder()
    {"fetch": fetch, "list": show, "verify": verify}[action](manifest, folder)


def fetch(manifest, folder: pathlib.Path) -> None:
    chosen = manifest.choose(SETS.value) if SETS.value else by_default(manifest, folder)
    if FROM.value:
        take_files(chosen, local_path(FROM.value), folder, ACCEPT.value)
    else:
        for one in chosen:
            fetch_set(one, folder, ACCEPT.value)
            print(f"{one.title}: {', '.join(file.name for file in one.files)}")
    rows = build(manifest, folder, local_path(ALPACA.value) if ALPACA.value else None)
    for name, count in rows.items():
        print(f"{name:<34}{count:>7} rows")
    missing = [split for split in manifest.splits if f"splits/{split}.json" not in rows]
    if missing:
        print(f"Not built, for want of sets: {', '.join(missing)}.")
    left = [] if SETS.value else [one for one in manifest.sets.values() if one not in chosen]
    for one in left:
        print(f"Not fetched unless it is named: {one.title}. `{one.command}`")
    print(f"Data: {folder.resolve()}")


def by_default(manifest, folder: pathlib.Path) -> list:
    """Returns the sets that are fetched if none is named: those that are files, with hashes that can be checked."""
    files = [one for one in manifest.sets.values() if not one.hub]
    return [one for one in files if ACCEPT.value or FROM.value or all(expected(file, folder) for file in one.files)]


def show(manifest, folder: pathlib.Path) -> None:
    found = status(manifest, folder)
    print(f"{'set':<20}{'prompts':>8}  {'licence':<28}{'here':<9}files")
    for one in manifest.sets.values():
        states = {found[f"raw/{file.name}"] for file in one.files}
        here = "yes" if states == {"ok"} else "no" if states == {"missing"} else "not right"
        names = ", ".join(file.name for file in one.files)
        print(f"{one.name:<20}{one.rows:>8}  {one.licence:<28}{here:<9}{names}")
    print(f"\nFolder: {folder}")


def verify(manifest, folder: pathlib.Path) -> None:
    found = status(manifest, folder)
    for name, state in found.items():
        print(f"{name:<36}{state}")
    wrong = [name for name, state in found.items() if state not in ("ok", "missing")]
    if wrong:
        raise UserError(
            f"{len(wrong)} files in {folder} are not what they should be: {', '.join(wrong)}. Remove them and run "
            "`refusal-jax data fetch` again."
        )
    if set(found.values()) == {"missing"}:
        raise UserError(f"{folder} holds no data. Run `refusal-jax data fetch` first.")
