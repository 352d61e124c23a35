"""A batch that runs, one token a step: questions join it between two steps, and answers that end leave it.

Knows logits, tokens and their text. Knows no terminal, no queue, no HTTP. A question that fails tells only itself.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from smartmops.evaluation.perplexity import room
from smartmops.tuner import joining

from .answering import Answer, Answerer, Likely, Question, Settings

logger = logging.getLogger(__name__)

HALF = "\ufffd"  # what a tokenizer makes of a character whose last bytes are still to come
IDLE = 1 / 4  # of the rows, which have ended, from which on a copy of the others is cheaper than to carry them along
ADAPTER = "default"


class Slots:
    """The rows of one batch, and what each of them says."""

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer
        self.spoken: list[Spoken] = []  # that have not ended
        self._places: list[Spoken] = []  # one for each row, ended or not
        self._rows: joining.Rows | None = None

    @property
    def open(self) -> bool:
        """Whether questions may join now; a cache that forgets (sliding windows) must be empty first."""
        return self._rows is None or self._rows.open

    @torch.no_grad()
    def join(self, questions: Sequence[Question]) -> list[Spoken]:
        """Read the prompts of more questions, and say the first token of each."""
        new = [Spoken(question, self.answerer) for question in questions]
        if new:
            with self.answerer.turn:
                self._join(new)
        return new

    def _join(self, new: Sequence[Spoken]) -> None:
        try:
            rows, logits = self._read([each.question for each in new])
            weights = self.answerer.weights(len(new))
            self._keep()
            both = rows if self._rows is None else joining.joined(self.answerer.model, ADAPTER, [self._rows, rows])
        except Exception as error:
            if len(new) == 1:
                new[0].fail(error)
                return
            for each in new:  # whose fault it is shows where each is read alone
                self._join([each])
            return
        for each, by in zip(new, weights, strict=True):
            each.by = by
        self._rows, self._places = both, [*self._places, *new]
        self._say(new, logits)

    def _read(self, questions: Sequence[Question]) -> tuple[joining.Rows, Tensor]:
        """The first pass over prompts, as `generate` makes it, and the logits of what comes after each."""
        batch = self.answerer.batch(questions)
        out = self.answerer.model.generate(
            **batch, max_new_tokens=1, do_sample=False, pad_token_id=self.answerer.pad, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
        told = batch.get("gate_weights", torch.full((len(questions), len(self.answerer.experts)), float("nan")))
        base = torch.tensor([question.base for question in questions], device=batch["input_ids"].device)
        rows = joining.Rows.begun(out.past_key_values, batch["attention_mask"], told.to(base.device), base)
        return rows, out.logits[0]

    @torch.no_grad()
    def step(self) -> None:
        """One more token of each answer."""
        with self.answerer.turn:
            self._keep(IDLE)
            if self._rows is None:
                return
            last = [each.ids[-1] if each.ids else self.answerer.pad for each in self._places]
            try:
                logits = joining.step(
                    self.answerer.model, self._rows, torch.tensor(last, device=self._rows.mask.device)
                )
            except Exception as error:  # nobody's own: the rows share this pass
                for each in self.spoken:
                    each.fail(error)
                self.spoken, self._places, self._rows = [], [], None
                return
            self._say(self._places, logits)

    def _say(self, whose: Sequence[Spoken], logits: Tensor) -> None:
        greedy = logits.argmax(-1).tolist()
        for row, each in enumerate(whose):
            if each.ended is not None:
                continue
            try:
                each.add(each.chosen(logits[row], greedy[row]))
            except Exception as error:
                each.fail(error)
        self.spoken = [each for each in self._places if each.ended is None]
        if not self.spoken:
            self._places, self._rows = [], None

    def _keep(self, idle: float = 0.0) -> None:
        """Take out rows that have ended, where they are more than a share `idle`."""
        ended = len(self._places) - len(self.spoken)
        if self._rows is None or not self._rows.open or ended <= idle * len(self._places):
            return
        stay = [row for row, each in enumerate(self._places) if each.ended is None]
        self._rows = joining.kept(self.answerer.model, ADAPTER, self._rows, stay)
        self._places = [self._places[row] for row in stay]


class Spoken:
    """One answer as it comes: what is certain of its text is handed on."""

    def __init__(self, question: Question, answerer: Answerer) -> None:
        self.question, self.tokenizer = question, answerer.tokenizer
        self.limit = min(question.settings.max_new_tokens, room(answerer.model, len(question.prompt.input_ids)))
        self.ends = set(answerer.stops)
        self.ids: list[int] = []
        self.handed = ""
        self.ended: str | None = None
        self.by: tuple[dict[str, float], float] = ({}, 1.0)
        self.fault: Exception | None = None
        self.likely: list[Likely] = []
        self._answer: Answer | None = None
        self._source = torch.Generator().manual_seed(question.settings.seed)
        penalty = getattr(answerer.model.generation_config, "repetition_penalty", None) or 1.0
        self._penalty = None if penalty == 1.0 else RepetitionPenaltyLogitsProcessor(penalty)

    def chosen(self, logits: Tensor, greedy: int) -> int:
        """The next token: `greedy`, the most likely one, unless the settings or the model's own say otherwise."""
        if self._penalty is not None:
            seen = torch.tensor([[*self.question.prompt.input_ids, *self.ids]], device=logits.device)
            logits = self._penalty(seen, logits[None].clone())[0]
            greedy = int(logits.argmax())
        settings = self.question.settings
        token = greedy if settings.temperature <= 0 else drawn(logits.cpu().double(), settings, self._source)
        if settings.logprobs is not None and token not in self.ends:
            self.likely.append(self._likely(logits, token, settings.logprobs))
        return token

    def _likely(self, logits: Tensor, token: int, count: int) -> Likely:
        logs = logits.float().log_softmax(-1)
        values, ids = logs.topk(count)
        tops = [(self._word(each), value) for each, value in zip(ids.tolist(), values.tolist(), strict=True)]
        return Likely(self._word(token), float(logs[token]), tuple(tops))

    def _word(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))

    def fail(self, error: Exception) -> None:
        """End without an answer, unless it has one; whoever asked is told that it failed."""
        if self._answer is None:
            logger.error("an answer failed", exc_info=error)
            self.fault, self.ended = error, "failed"
            self._answer = Answer("", len(self.ids), "failed", {}, 0.0)
            try:
                self.question.on_end(self._answer)
            except Exception:
                logger.exception("whoever asked could not be told")

    def add(self, token: int) -> None:
        """Take one more token; hand on what it makes certain."""
        self.ids.append(token)
        if self.question.cancelled:
            self.end("cancelled")
        elif token in self.ends or self._stopped() is not None:
            self.end("stop")
        elif len(self.ids) >= self.limit:
            self.end("length")
        else:
            self._hand(self._certain())

    def end(self, how: str) -> Answer:
        """Hand on the rest, once."""
        if self._answer is None:
            self.ended, at, text = how, self._stopped(), self._text()
            text = text[:at]
            text = text if self.question.whole else text.rstrip()
            self._hand(text)
            weights, left = ({}, 1.0) if self.question.base else self.by
            likely = None if self.question.settings.logprobs is None else tuple(self.likely)
            self._answer = Answer(text, len(self.ids), how, weights, left, likely)
            self.question.on_end(self._answer)
        return self._answer

    def _text(self) -> str:
        found = str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        return found if self.question.whole else found.lstrip()

    def _stopped(self) -> int | None:
        """Where the first of the texts begins that end the answer."""
        text = self._text() if self.question.settings.stop else ""
        found = [at for stop in self.question.settings.stop if (at := text.find(stop)) >= 0]
        return min(found, default=None)

    def _certain(self) -> str:
        """Without half a character, blanks that may turn out to be the last ones, and the start of a stop."""
        text = self._text().rstrip(HALF)
        text = text if self.question.whole else text.rstrip()
        starts = [len(text) - size for stop in self.question.settings.stop for size in range(1, len(stop))
                  if text.endswith(stop[:size])]  # fmt: skip
        return text[: min(starts, default=len(text))]

    def _hand(self, text: str) -> None:
        if len(text) > len(self.handed) and text.startswith(self.handed):
            piece, self.handed = text[len(self.handed) :], text
            self.question.on_text(piece)


def drawn(scores: Tensor, settings: Settings, source: torch.Generator) -> int:
    """A token by chance, among the most likely ones that together have `top_p`.

    Chance falls on each token by its number, not by its rank: two that are nearly as likely may change places beside
    other rows of a batch, and that must not change what is drawn elsewhere.
    """
    chances = ((scores - scores.max()) / settings.temperature).softmax(-1)
    ranked, order = chances.sort(descending=True)
    out = torch.zeros_like(chances, dtype=torch.bool).scatter(-1, order, ranked.cumsum(-1) - ranked >= settings.top_p)
    return int(torch.multinomial(chances.masked_fill(out, 0.0), 1, generator=source))
