"""The study's settings and their defaults: the paper's, on the embedded model and prompts."""

import ml_collections
from ml_collections import ConfigDict

from refusal_jax.data.prompts import BUNDLED


def get_config() -> ConfigDict:
    """Every setting of a study; config files start from this and change what they need."""
    config = ConfigDict()
    config.model = ""  # folder of an HF checkpoint, or its address (gs://bucket/folder); "" is the embedded demo model
    config.cache = ""  # folder or address of converted copies of checkpoints, read instead of them; "": none
    config.dtype = "auto"  # float32, bfloat16, float16; auto: float32 on CPU, bfloat16 elsewhere
    config.batch_size = 0  # rows of a forward pass; here and below, 0: as many as fit, up to what pays (a few on a CPU)
    config.chat_template = ""  # a name of templates.BUILT_IN or a .jinja file; "": the tokenizer's, or recognised
    config.thinking = False  # ask models that can think to do so; refusal is read at the reply's first token, so don't
    # how refusals begin, as token ids or texts (of which the first token counts), whose probabilities are summed;
    # (): measured on training prompts
    config.refusal_tokens = ()  # (on the command line: --config.refusal_tokens="('I', 'As')")
    # how many of the last post-instruction tokens are candidate positions; None: all of them
    config.positions = ml_collections.config_dict.placeholder(int)
    config.filter = True  # keep only harmful prompts that are refused and harmless ones that are not
    # devices along each mesh axis; all 0: planned for the TPUs there are, one device on a CPU
    config.mesh = ConfigDict({"data": 0, "fsdp": 0, "model": 0})
    config.data = ConfigDict(
        {  # each a .json, .jsonl, .csv or .txt file, "bundled", or of fetched data: "paper", or the name of a set
            "harmful_train": BUNDLED,
            "harmful_val": BUNDLED,
            "harmful_test": BUNDLED,
            "harmless_train": BUNDLED,
            "harmless_val": BUNDLED,
            "harmless_test": BUNDLED,
            # harmless prompts that look harmful, such as ("xstest", "or_bench_hard"): completed at baseline and under ablation
            "over_refusal": (),
            "n_train": 128,  # prompts drawn from each set, by the seed
            "n_val": 32,
            "n_test": 100,
            "seed": 42,
        }
    )
    config.select = ConfigDict(
        {
            # score every candidate fully, for figures; same pick, 3 to 5 times the work
            "full_grid": False,
            "batch_size": 0,  # rows: several candidates, each with every val prompt
            "kl_threshold": 0.1,  # discard above: the direction does more than refusal
            "induce_threshold": 0.0,  # discard below: adding it does not make harmless prompts refused
            "prune_fraction": 0.2,  # discard candidates in this last fraction of the layers
        }
    )
    config.generation = ConfigDict(
        {
            "max_new_tokens": 512,
            # True: greedy decoding under the checkpoint's generation_config.json (such as its repetition_penalty), as in
            # transformers; False: plain greedy decoding, as for the paper's numbers
            "from_checkpoint": False,
            "batch_size": 0,  # rows that are decoded together
            "conditions": (
                "harmful_baseline",
                "harmful_ablation",
                "harmful_actadd",
                "harmless_baseline",
                "harmless_actadd",
            ),
        }
    )
    # "substring_matching", "substring_extended", "refusal_score", and judge models: "llamaguard2=FOLDER", "llamaguard3=FOLDER",
    # "harmbench=FOLDER@TEMPLATE.txt", "strongreject=FOLDER@TEMPLATE.txt", "llm=FOLDER" (refusal-jax evaluate --help)
    config.judges = ("substring_matching",)
    config.loss = ConfigDict(
        {
            "batch_size": 0,
            "text_tokens": 256,  # plain text is cut to this, as in the paper; chat rows only to the model's context
            "text_files": (),  # "pile" if fetched, .txt (one document a line) or .json, .jsonl, .csv with a text field
            "chat_files": (),  # "alpaca" if fetched, .json or .jsonl of {"prompt" or "instruction", "response" or "output"}
        }
    )
    return config
