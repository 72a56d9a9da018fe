"""The study's settings, what each means, and their defaults: the paper's, on the embedded model and prompts.

Config files start from `get_config()` and assign the fields that they change. On the command line a field is overridden by
`--config.SECTION.FIELD=VALUE`; `refusal-jax study --help` lists all of them, from this file.
"""

import dataclasses

from refusal_jax.chat.templates import BUILT_IN
from refusal_jax.data.settings import DataSettings
from refusal_jax.settings import OptionalInt, Settings, option, section

FITTING = "0 chooses the most that fit in memory and still gain speed (a few on a CPU)"


@dataclasses.dataclass
class MeshSettings(Settings, path="mesh"):
    """The devices along each axis of the mesh."""

    data: int = option(
        0,
        "Number of devices that the prompts are split over; with all three at 0, the mesh is planned for the TPUs present, and a "
        "CPU uses one device",
    )
    fsdp: int = option(0, "Number of devices that the prompts and the storage of weights are split over")
    model: int = option(0, "Number of devices that heads, MLP and vocabulary are split over (tensor parallelism)")


@dataclasses.dataclass
class SelectSettings(Settings, path="select"):
    """Tells how the direction is selected among the candidates (paper, appendix C)."""

    full_grid: bool = option(
        False,
        "Score every candidate on every measure, for the figures; the selection is the same, at 3 to 5 times the work",
    )
    batch_size: int = option(
        0, f"Rows of a forward pass, which combines several candidates with every validation prompt; {FITTING}"
    )
    kl_threshold: float = option(
        0.1,
        "Discard candidates whose ablation changes the next token after harmless prompts by more than this KL divergence",
    )
    induce_threshold: float = option(
        0.0, "Discard candidates whose addition leaves the refusal score of harmless prompts below this value"
    )
    prune_fraction: float = option(
        0.2, "Discard candidates from the last layers, which make up this fraction of all layers"
    )


@dataclasses.dataclass
class GenerationSettings(Settings, path="generation"):
    """Tells how completions are generated, and under which interventions."""

    max_new_tokens: int = option(512, "Maximum length of a completion in tokens")
    from_checkpoint: bool = option(
        False,
        "Decode greedily under the checkpoint's generation_config.json (such as its repetition_penalty), as transformers does; "
        "False is plain greedy decoding, as in the paper",
    )
    batch_size: int = option(0, f"Number of completions decoded together; {FITTING}")
    conditions: tuple[str, ...] = option(
        ("harmful_baseline", "harmful_ablation", "harmful_actadd", "harmless_baseline", "harmless_actadd"),
        "Pairs of prompts and intervention to complete: harmful or harmless, and baseline, ablation, actadd or affine",
    )


@dataclasses.dataclass
class LossSettings(Settings, path="loss"):
    """The texts on which the loss is measured, besides the model's own completions."""

    batch_size: int = option(0, f"Rows of a forward pass; {FITTING}")
    text_tokens: int = option(
        256, "Number of tokens that plain text is cut to, as in the paper; chats are only cut to the model's context"
    )
    text_files: tuple[str, ...] = option(
        (),
        "Plain text to measure the loss on: 'pile' if fetched, .txt files (one document per line), or .json, .jsonl or .csv "
        "files with a text field",
    )
    chat_files: tuple[str, ...] = option(
        (),
        "Chats to measure the loss on: 'alpaca' if fetched, or .json or .jsonl files of {'prompt' or 'instruction', 'response' "
        "or 'output'}",
    )


@dataclasses.dataclass
class BehaviourSettings(Settings, path="behaviour"):
    """The behaviour that the study is about; refusal by default. The files of `data` keep their names: the harmful ones are those
    of the side that shows the behaviour."""

    name: str = option(
        "refusal",
        "What the behaviour is called in the report, such as flinching; the next settings are of other behaviours",
    )
    present: str = option("harmful", "Name of the side that shows it, whose prompts are those of data.harmful_*")
    absent: str = option("harmless", "Name of the side that does not, whose prompts are those of data.harmless_*")
    measure: str = option(
        "tokens",
        "What filter and selection go by: 'tokens', the probability of opening tokens as the reply's first (refusal_tokens, or "
        "those that tell the two sides apart), or 'judge', a judge of whole replies",
    )
    judge: str = option(
        "",
        "Name of the judge that decides, of those in `judges`: its label 0 is the behaviour; '' is the first of them, and for "
        "refusal the first judge of refusals",
    )
    reply_tokens: int = option(
        48, "With the measure 'judge', length in tokens of the replies that filter and selection judge"
    )
    candidates: int = option(
        4, "With the measure 'judge', number of directions, the best by their activations, that are tried on replies"
    )


@dataclasses.dataclass
class StudyConfig(Settings):
    """Every setting of a study."""

    model: str = option(
        "",
        "Folder of a Hugging Face checkpoint, its name on the hub (ORG/NAME or ORG/NAME@REVISION), or its address "
        "(gs://BUCKET/FOLDER); '' is the embedded demo model",
    )
    cache: str = option(
        "",
        "Folder or address for converted copies of checkpoints, which are read in place of the originals; '' keeps none",
    )
    download: bool = option(
        False,
        "On several hosts, have each download the models that are named on the hub into its own cache; False has each read only "
        "its slices from the hub",
    )
    dtype: str = option("auto", "float32, bfloat16 or float16; auto is float32 on a CPU and bfloat16 elsewhere")
    batch_size: int = option(0, f"Rows of a forward pass; {FITTING}")
    chat_template: str = option(
        "",
        f"Name of a built-in template ({', '.join(BUILT_IN)}) or a .jinja file; '' is the "
        "tokenizer's own template or, if it has none, the one that its special tokens indicate",
    )
    system_prompt: str = option(
        "",
        "Text of the system prompt, or a .txt file that holds it; '' is the chat template's default, and 'none' is no system "
        "prompt where the template writes one by default",
    )
    thinking: bool = option(
        False,
        "Ask models that can think to do so, and read refusal at the thought's first token; off, models that always think get a "
        "thought that is closed, and refusal is read at the reply's first token",
    )
    refusal_tokens: tuple[int | str, ...] = option(
        (),
        "Tokens that refusals begin with, as ids or strings such as ('I', 'As'); for a string, only its first token is used. "
        "Their probabilities are summed. () measures them on the training prompts",
    )
    positions: OptionalInt = option(
        None, "Number of last post-instruction tokens that are candidate positions; None uses all of them"
    )
    filter: bool = option(True, "Keep only harmful prompts that are refused and harmless ones that are not")
    behaviour: BehaviourSettings = section(BehaviourSettings, "The behaviour that the study is about")
    mesh: MeshSettings = section(MeshSettings, "The devices along each axis of the mesh")
    data: DataSettings = section(DataSettings, "Where prompts come from, and how many are drawn")
    select: SelectSettings = section(SelectSettings, "How the direction is selected among the candidates")
    generation: GenerationSettings = section(GenerationSettings, "How completions are generated")
    judges: tuple[str, ...] = option(
        ("substring_matching",),
        "Judges of the completions: substring_matching, substring_extended, refusal_score; of words: uses=WORDS, avoids=WORDS; "
        "and judge models: llamaguard2=MODEL, llamaguard3=MODEL, harmbench=MODEL@TEMPLATE.txt, strongreject=MODEL@TEMPLATE.txt, "
        "llm=MODEL (`refusal-jax evaluate --help`)",
    )
    loss: LossSettings = section(LossSettings, "The texts on which the loss is measured")


def get_config() -> StudyConfig:
    """Returns the defaults of every setting; config files start from this and change what they need."""
    return StudyConfig()
