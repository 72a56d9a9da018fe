"""The checkpoint that is tested: its own study, its base, and the measurement that all tests share."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.padding import bucket
from refusal_jax.conditions import with_origin
from refusal_jax.data.sampling import SPLITS
from refusal_jax.directions import Direction
from refusal_jax.edits import Edits
from refusal_jax.judges.judge import Judge
from refusal_jax.judges.judge import Outcome as Did
from refusal_jax.judges.outcomes import judged_once
from refusal_jax.mechanism.edited_prompts import EditedPrompts
from refusal_jax.plan.programs import Group
from refusal_jax.resistance.attack import Budget, Measured
from refusal_jax.resistance.settings import ResistSettings
from refusal_jax.runs.artifacts import DIRECTION, MEANS, PROMPTS, SETUP, UNATTACKED
from refusal_jax.runs.run import Run
from refusal_jax.study.completions import write_replies
from refusal_jax.study.config import StudyConfig
from refusal_jax.study.shared import Study


class Subject(Study):
    """A checkpoint under test. It is a `Study` whose prompts, directions and selection are done in its own folder, so that
    `model`, `run`, `sizes`, `refusal_ids()` and `instructions(split)` are those of that study.

    settings: of the tests. judge: of replies. base: the folder of the checkpoint that it was made from, None if there is
    none. given: the direction that the plain test ablates, None if it is the checkpoint's own; origin: where it comes from,
    in words.
    """

    def __init__(
        self,
        settings: ResistSettings,
        config: StudyConfig,
        run: Run,
        folder: pathlib.Path,
        judge: Judge,
        base: pathlib.Path | None = None,
        given: Direction | None = None,
        origin: str = "",
        groups: tuple[Group, ...] = (),
    ):
        super().__init__(config, run, folder, groups=groups)
        self.settings, self.judge, self.base, self.given, self.origin = settings, judge, base, given, origin
        self.seed = settings.seed
        self._judge = judge  # as it was given: without what it loads
        self.best: tuple[Direction, str, float] | None = None  # a candidate that takes the place of an own direction
        self._harmless: dict[str, EditedPrompts] = {}
        self._plain: dict[str, Measured] = {}

    @property
    def parameters(self) -> int:
        """Returns the number of the model's parameters."""
        return sum(int(np.prod(array.shape)) for array in self.model.decoder.weights().values())

    def texts(self, split: str) -> list[str]:
        """Returns all prompts of a split, such as "harmful_val", whether or not the study's filter kept them."""
        return [row["instruction"] for row in self.run.read_json(PROMPTS)[split]]

    def forget(self) -> None:
        """Frees the devices' memory of the model, of what was computed with it, and of the judge."""
        self._harmless.clear()
        self.judge = self._judge
        self.release()

    def judged(self, rows: Sequence[dict]) -> list[Did | None]:
        """Returns what each reply does, the same in every process. A judge that runs a model keeps it from here on, beside the
        checkpoint's, until `forget`."""
        if self.judge.uses_devices:
            self.judge = self.judge.on(self.mesh).held()
        return judged_once(self.judge, rows)

    def own_direction(self) -> Direction | None:
        """Returns the direction that the checkpoint's own study selected, with its origin; None if it found none."""
        if not self.run.exists(DIRECTION):
            return None
        return with_origin(Direction.selected(self.run), self.run.read_tensors(MEANS))

    def direction_means(self) -> dict[str, np.ndarray] | None:
        """Returns what the study writes of the means, `mean_diffs`, `harmful` and `harmless`, each `[P, L, D]`; None where
        its filter left no prompts."""
        return self.run.read_tensors(MEANS) if self.run.exists(MEANS) else None

    def scoring_ids(self) -> list[int]:
        """Returns the ids of the refusal tokens, none where no beginning of a reply tells the two kinds of prompts apart."""
        return self.refusal_ids() if self.run.exists(SETUP) else []

    def harmless_prompts(self, split: str = "test") -> EditedPrompts:
        """Returns the harmless prompts of a part, with their unattacked logits."""
        if split not in self._harmless:
            prompts = self.texts(f"harmless_{split}")
            self._harmless[split] = EditedPrompts.build(self.model, prompts, self.sizes.select, self.scoring_ids())
        return self._harmless[split]

    def unattacked(self, split: str = "test") -> Measured:
        """Measures what the checkpoint does without any attack, and keeps it for `plain`."""
        self._plain[split] = self._measured(self.model, None, self.texts(f"harmful_{split}"), split)
        return self._plain[split]

    def plain(self, split: str = "test") -> Measured:
        """Returns what the checkpoint does without any attack: of the test prompts what is in its folder, once that is
        measured."""
        if split not in self._plain and split == "test" and self.run.exists(UNATTACKED):
            self._plain[split] = Measured.of(self.run.read_json(UNATTACKED))
        return self._plain.get(split) or self.unattacked(split)

    def measure(
        self,
        edits: Edits | None = None,
        model: ChatModel | None = None,
        suffixes: str | Sequence[str] | None = None,
        prefills: Sequence[Sequence[int]] | None = None,
        *,
        own: bool = False,
        split: str = "test",
        budget: Budget | None = None,
    ) -> Measured:
        """Returns what the checkpoint does under an attack, by its replies to the prompts of a part.

        edits: one row, in force for harmful and harmless prompts. model: the attacked weights in place of the checkpoint's.
        suffixes: a text that is put after all harmful prompts, or one for each. prefills: for each harmful prompt the tokens
        that its reply begins with. The judge then reads the whole reply, and also what follows them alone: where either
        refuses, the prompt is refused; and a reply to which the model adds nothing is broken, unless the tokens are the model's
        `own` words. Where neither edits nor weights change, harmless prompts are as without an attack.
        split: "test" for the result, "val" for what a test tunes. budget: of the test, if this is part of its search: the
        tokens are counted. Raises ValueError for suffixes or prefills of another number than the prompts, UserError for
        prompts that do not fit the context, and for values that are not finite.
        """
        asked = suffixed(self.texts(f"harmful_{split}"), suffixes)
        as_plain = edits is None and model is None
        return self._measured(model or self.model, edits, asked, split, prefills, as_plain, budget, own)

    def _measured(
        self,
        model: ChatModel,
        edits: Edits | None,
        harmful: Sequence[Prompt],
        split: str,
        begun: Sequence[Sequence[int]] | None = None,
        as_plain: bool = False,
        budget: Budget | None = None,
        own: bool = False,
    ) -> Measured:
        """Returns what replies do; as_plain: whether harmless prompts are as without an attack."""
        harmless = [] if as_plain else self.texts(f"harmless_{split}")
        starts = None if begun is None else [*begun, *([] for _ in harmless)]
        rows = self.replies(model, [*harmful, *harmless], edits, budget, starts)
        texts = [*self.texts(f"harmful_{split}"), *harmless]
        rows = [{"prompt": text, **row} for text, row in zip(texts, rows, strict=True)]
        did, count = self.judged(rows), len(harmful)
        if begun is not None:
            rest = self.judged([row | {"response": row.get("continued", row["response"])} for row in rows])
            did = [Did.REFUSES if then is Did.REFUSES else one for one, then in zip(did, rest, strict=True)]
            none = [
                not own and bool(start) and not row["continued"] for start, row in zip(starts or (), rows, strict=True)
            ]
            did = [Did.BROKEN if nothing else one for one, nothing in zip(did, none, strict=True)]
        cut = sum(one is Did.COMPLIES and self._is_cut(row) for one, row in zip(did[:count], rows, strict=False))
        if as_plain:
            plain = self.plain(split)
            replies = {"harmful": rows, "harmless": plain.replies.get("harmless", [])}
            return Measured(tuple(did), plain.harmless, (0.0,) * len(plain.harmless), cut, replies)
        kl = self._kl(model, edits, split, budget)
        replies = {"harmful": rows[:count], "harmless": rows[count:]}
        return Measured(tuple(did[:count]), tuple(did[count:]), kl, cut, replies)

    def replies(
        self,
        model: ChatModel,
        prompts: Sequence[Prompt],
        edits: Edits | None = None,
        budget: Budget | None = None,
        begun: Sequence[Sequence[int]] | None = None,
    ) -> list[dict]:
        """Returns the greedy replies to prompts as rows `{"response", …}`, all under one edit. begun: the tokens that each
        reply begins with; rows then have what follows as "continued"."""
        cfg, found = model.config, {}
        begun = [[] for _ in prompts] if begun is None else begun
        ids = [[*model.chat.prompt_ids(prompt), *start] for prompt, start in zip(prompts, begun, strict=True)]
        under = (edits or Edits.none(cfg.d_model)).for_batch(len(ids), cfg.n_layers, cfg.d_model)
        longest = max([*map(len, ids), self._longest])
        length = min(bucket(longest), cfg.context_length)
        at_once = min(self.sizes.generation, 8 * -(-len(ids) // 8))
        starts, most = begun if any(begun) else (), self.settings.max_new_tokens
        write_replies(model, ids, under, most, at_once, "replies", found.update, length, starts)
        rows = [found[number] for number in range(len(ids))]
        if budget:
            budget.forward(sum(map(len, ids)) + sum(len(model.chat.ids(row["response"])) for row in rows))
        return rows

    def _is_cut(self, row: Mapping) -> bool:
        """Returns whether a reply, with its thought, is as long as a reply may be; its text, read anew, may have a token
        less."""
        text, chat = row.get("continued"), self.model.chat
        if text is None:
            thought = row.get("thought", "").removeprefix(chat.opened_thought or "")
            text = f"{thought}\n\n{row['response']}" if thought else row["response"]
        return len(chat.ids(text)) >= self.settings.max_new_tokens - 1

    @property
    def _longest(self) -> int:
        """Returns the tokens of the longest prompt of the study, to which all are padded, so that programs are compiled
        once."""
        return max(len(self.model.chat.prompt_ids(text)) for split in SPLITS[2:] for text in self.texts(split))

    def _kl(self, model: ChatModel, edits: Edits | None, split: str, budget: Budget | None) -> tuple[float, ...]:
        """Returns how far an attack moves the next token after each harmless prompt; nothing for weights of another
        vocabulary, whose next tokens are others."""
        if model.config.vocab_size != self.model.config.vocab_size:
            return ()
        prompts = self.harmless_prompts(split)
        if budget:
            budget.forward(sum(int(batch.mask.sum()) for _, batch, _ in prompts.batches))
        if model is not self.model:
            return tuple(prompts.divergence(model, edits).tolist())
        if edits is None:
            return (0.0,) * prompts.count
        return tuple(prompts.read(edits).kl_mn[0].tolist())


def suffixed(prompts: Sequence[str], suffixes: str | Sequence[str] | None) -> list[str]:
    """Returns prompts with a suffix each. Raises ValueError for suffixes of another number than the prompts."""
    after = [suffixes] * len(prompts) if isinstance(suffixes, str) else suffixes or [""] * len(prompts)
    return [prompt + suffix for prompt, suffix in zip(prompts, after, strict=True)]
