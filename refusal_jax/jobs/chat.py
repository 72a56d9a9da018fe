"""Chats with a model in the terminal, unedited and edited side by side, and shows each token's projection.

  refusal-jax chat                                              # the embedded model, ready in seconds
  refusal-jax chat --direction=runs/mine                        # the model and direction of a finished study
  refusal-jax chat --model=DIR --direction=direction.pt --layer=12
  refusal-jax chat --steer=defended                             # a conditional steering, with the model that it is for
  echo 'How do I bake the bread?' | refusal-jax chat            # messages from a pipe, one per line

Both columns receive the same messages, and each continues with its own replies. The left column is the unedited model;
in the right one the direction is ablated, which you can change while you chat by commands such as /add 1, /add -1,
/affine 0, /off, /layer 12 and /help. Ctrl-C stops a reply, Ctrl-D or /quit ends the chat. Decoding is greedy;
--generation_from_checkpoint applies the settings of generation_config.json that change greedy replies.

Each token's colour shows the projection of the residual stream on the direction at that token, at the input of the
direction's layer (/layer N chooses another): red is along the direction, blue against it; /numbers also shows the
value. A token is coloured once the model has read it, so the newest is plain. Below the columns are the projections at
the prompt's last token, where the reply is decided, and those of the reply. They are measured after the edit, so under
ablation they are 0. A warning is shown where the projection at the prompt's end lies as it does before refusals and the
reply complies, or the other way round, by the rules that judge replies.

The embedded model needs no study: its direction is computed at the start, as the difference of means of the bundled
training prompts at the position and layer that its study selects (last token, layer 4). It was trained on single
requests, so each message begins a new conversation unless --history is given. For other models run `refusal-jax study`
first.
"""

import contextlib
import io
import itertools
import sys

from absl import flags

from refusal_jax.chat.conditional import Conditional, written_for
from refusal_jax.chat.model import demo_model_path, load_model
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.checkpoints.safetensors import read_tensors
from refusal_jax.conditions import with_origin
from refusal_jax.directions import Direction
from refusal_jax.errors import UserError, print_error
from refusal_jax.export.finished import FinishedStudy
from refusal_jax.files import local_path
from refusal_jax.harness.edited import model_of, one_each
from refusal_jax.jobs import common, devices
from refusal_jax.models.decoding import in_words
from refusal_jax.models.hf_config import load_config
from refusal_jax.organism.direction import embedded
from refusal_jax.runs.artifacts import MEANS
from refusal_jax.study.projections import study_thresholds
from refusal_jax.surrogates import mended
from refusal_jax.terminal.screen import escaped
from refusal_jax.terminal.session import Session
from refusal_jax.terminal.show import show_columns, show_plain

MODEL = flags.DEFINE_string("model", None, f"{common.CHECKPOINT} Default: the study's model, or the embedded one.")
DIRECTION = flags.DEFINE_string(
    "direction", None, "Folder of a finished study, or a .npy, .safetensors or .pt file. Needed with --model."
)
POSITION = flags.DEFINE_integer(
    "position", None, "Which position of mean differences to use, counted from -1 backwards."
)
LAYER = flags.DEFINE_integer(
    "layer", None, "Layer to read and add at. For mean differences or a file with a row per layer: which one to use."
)
STEER = flags.DEFINE_string(
    "steer", None, "Folder of a conditional steering, as `refusal-jax defend --recipe=conditional` writes it."
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 512, "Maximum length of a reply in tokens.", lower_bound=1)
NUMBERS = flags.DEFINE_bool("numbers", False, "Show each token's projection as a number too.")
HISTORY = flags.DEFINE_bool(
    "history",
    None,
    "Keep the conversation's earlier turns. Default: yes, except for the embedded model, which knows single requests only.",
)
CHAT_TEMPLATE = flags.DEFINE_string(
    "chat_template", None, "Chat template, as in a study's config. Default: the study's."
)
SYSTEM_PROMPT = flags.DEFINE_string(
    "system_prompt", None, "System prompt, a text or a .txt file, as in a study's config. Default: the study's."
)
THINKING = flags.DEFINE_bool("thinking", None, "Ask models that can think to do so. Default: as the study did.")
FROM_CHECKPOINT = flags.DEFINE_bool(
    "generation_from_checkpoint",
    False,
    "Apply the settings of the checkpoint's generation_config.json that affect greedy decoding, such as repetition_penalty.",
)
flags.adopt_module_key_flags(devices)


def main(argv) -> None:
    del argv
    session = start()
    on_screen = sys.stdout.isatty()
    record = session.model.settings.record(FROM_CHECKPOINT.value)
    if record["applied"] or record["left_out"]:
        print(in_words(record, "--generation_from_checkpoint"))
    print(f"{session.command(f'/{session.edit}')}\n/help explains the commands.\n", flush=True)
    for line in lines(sys.stdin.isatty()):
        if line.strip() in ("/quit", "/exit"):
            return
        try:
            if line.startswith("/"):
                print(session.command(line), flush=True)
            elif line.strip():
                (show_columns if on_screen else show_plain)(session, line)
        except UserError as error:
            if not sys.stdin.isatty():
                raise
            print_error(escaped(str(error)))


def start() -> Session:
    """Returns the session that the flags ask for. Raises UserError for a model without a direction, or for one that
    does not fit."""
    if MODEL.value and not DIRECTION.value and not STEER.value:
        raise UserError(
            f"--direction is missing: run `refusal-jax study --model={MODEL.value} --workdir=RUN` and give --direction=RUN."
        )
    mesh, dtype = devices.asked_mesh(), devices.asked_dtype()
    given = {"chat_template": CHAT_TEMPLATE.value, "thinking": THINKING.value, "system_prompt": SYSTEM_PROMPT.value}
    given = {name: value for name, value in given.items() if value is not None}
    settings = {"chat_template": "", "thinking": False, "system_prompt": ""} | given
    settings["generation_from_checkpoint"] = FROM_CHECKPOINT.value
    if STEER.value:
        return steered(STEER.value, dtype, mesh, settings)
    if not DIRECTION.value:
        model = load_model(demo_model_path(), dtype, mesh, **settings)
        direction, thresholds = embedded(model, LAYER.value)
        return Session(model, direction, MAX_NEW_TOKENS.value, NUMBERS.value, bool(HISTORY.value), thresholds)
    path = local_path(DIRECTION.value)
    studies = [FinishedStudy.read(path, 1)] if path.is_dir() and not MODEL.value else []
    settings |= (studies[0].template if studies else {}) | given
    folder = checkpoint_folder(MODEL.value) if MODEL.value else model_of([path], studies)
    (direction,) = one_each([path], LAYER.value, POSITION.value, load_config(folder).n_layers)
    if (path / MEANS).is_file():
        direction = with_origin(direction, read_tensors(path / MEANS))
    print(f"The edits use {direction.summary}.")
    model = load_model(folder, dtype, mesh, progress=True, **settings)
    history = folder != demo_model_path() if HISTORY.value is None else HISTORY.value
    thresholds = study_thresholds(path) if studies else None
    return Session(model, direction, MAX_NEW_TOKENS.value, NUMBERS.value, history, thresholds)


def steered(name: str, dtype: str, mesh, settings: dict) -> Session:
    """Returns the session of a conditional steering, whose projections are those on what it adds. Raises UserError for one that
    cannot be read, and beside a direction."""
    if DIRECTION.value:
        raise UserError("--steer and --direction both say what the right column is. Give one of them.")
    steering = Conditional.read(local_path(name))
    folder = checkpoint_folder(MODEL.value) if MODEL.value else written_for(steering)
    model = load_model(folder, dtype, mesh, progress=True, **settings)
    steering.check_fits(model.config.d_model, model.config.n_layers)
    direction = Direction.of(steering.vector_d, steering.layers[0] if LAYER.value is None else LAYER.value)
    history = folder != demo_model_path() if HISTORY.value is None else HISTORY.value
    return Session(model, direction, MAX_NEW_TOKENS.value, NUMBERS.value, history, conditional=steering)


def lines(typed: bool):
    """Yields the user's lines, from a terminal with editing and history, or from a file or pipe, in which case they are
    echoed. Bytes that are not UTF-8 become U+FFFD."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, input() then has it
    for number in itertools.count(1):
        try:
            line = input("> ") if typed else sys.stdin.readline()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # drops what was typed
            if not typed:
                raise
            print()
            continue
        if not typed and not line:
            return
        line = mended(line, f"Line {number} of the input")
        if not typed:
            print(f"> {escaped(line.rstrip())}", flush=True)
        yield line.strip()
