"""The model ``quasar`` of EleutherAI's lm-evaluation-harness: log-likelihoods and text by a drafter and a verifier."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from quasar.errors import RequestError
from quasar.experiment.likelihood import Pair, Sampled, log_likelihood
from quasar.results.console import Reporter

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
else:
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError:
        raise RequestError(
            "the lm-evaluation-harness is not installed; pip install 'quasar-speculative[eval]', or in a checkout "
            "pip install -c constraints.txt -e '.[eval]'"
        ) from None

Item = TypeVar("Item")

NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "min_p": 0.0, "typical_p": 1.0}
"""Arguments of a task's generation that change nothing if they have these values. Others are refused."""


def evaluate(arguments: Sequence[str]) -> None:
    """Call the command ``lm_eval`` with these arguments. It finds models only in its own registry, hence this way."""
    from lm_eval.__main__ import cli_evaluate

    register()
    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()


def register() -> None:
    """Make the harness know ``--model quasar``."""
    from lm_eval.api.registry import register_model

    register_model("quasar")(QuasarLM)


class QuasarLM(TemplateLM):
    """A pair of the configuration. Tokens, windows, truncation and stop strings are those of the harness's own HFLM.

    overrides: those of run.py, such as ``model=smollm2_135m``, ``verifier=int4``, ``drafter=ngram``,
        ``verifier.group_size=64``; their values cannot have commas
    batch_size: 1 or "auto", because one sequence is decoded at a time
    device: ``cpu``, or ``cuda:0``, the harness's default, for a GPU if there is one

    Raises RequestError for what ``run.py`` would refuse too.
    """

    def __init__(
        self, batch_size: int | str = 1, max_batch_size: int | None = None, device: str | None = None, **overrides: Any
    ) -> None:
        super().__init__()
        if str(batch_size) not in ("1", "auto"):
            raise RequestError(f"--batch_size {batch_size}: must be 1 (or auto), one sequence is decoded at a time")
        if device is not None:
            # Without an argument the harness asks for cuda:0 on every machine, and HFLM then takes what there is.
            overrides.setdefault("device", "auto" if device.startswith("cuda") else device)
        self._pair = Pair.built([f"{key}={_spelled(value)}" for key, value in overrides.items()], Reporter())
        self._verifier = self._pair.parts.verifier
        self.tokenizer = self._pair.parts.tokenizer.inner

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def max_length(self) -> int:
        return self._verifier.context_length

    @property
    def max_gen_toks(self) -> int:
        """Most new tokens of a task that does not say how many."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__") or self._pair.parts.checkpoint.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(str(self.tokenizer.decode(self.prefix_token_id)))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._pair.parts.checkpoint.chat_template,
        )
        return str(text)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes next to the results."""
        parts = self._pair.parts
        return {
            "model_origin": parts.checkpoint.origin,
            "drafter": parts.settings.drafter["name"],
            "verifier": parts.settings.verifier["name"],
            "verifier_is_reference": self._verifier.is_reference,
            "verifier_details": list(self._verifier.details),
        }

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        found = []
        for request in _watched(requests, "loglikelihood_rolling", disable_tqdm):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            scored = [log_likelihood(self._verifier, *make_disjoint_window(window)) for window in windows]
            found.append(sum(value for value, _ in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

        end = self.tokenizer.decode(self.eot_token_id)
        found = []
        for request in _watched(requests, "generate_until", disable_tqdm):
            context, given = request.args
            options = dict(normalize_gen_kwargs(given, self.max_gen_toks))
            stop, length = handle_stop_sequences(options.pop("until"), eos=end), int(options.pop("max_gen_toks"))
            tokens = self._pair.generate(self.tok_encode(context), [*filter(None, stop)], length, _sampled(options))
            found.append(postprocess_generated_text(self._pair.parts.tokenizer.decode(tokens), stop, None))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for texts, context, continuation in _watched(requests, "loglikelihood", disable_tqdm):
            found.append(log_likelihood(self._verifier, context, continuation))
            self.cache_hook.add_partial("loglikelihood", texts, found[-1])
        return found


def _spelled(value: object) -> str:
    """Return a value as it is written on the command line. The harness has converted numbers, ``true`` and ``None``."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _sampled(options: dict[str, Any]) -> Sampled:
    """Return how tokens are drawn, from the arguments of a task.

    Raises RequestError for an argument that would change the text and that no pair of this program follows.
    """
    draws, temperature = options.pop("do_sample"), float(options.pop("temperature", 0.0))
    top_k, top_p = options.pop("top_k", None), float(options.pop("top_p", 1.0))
    for name, value in options.items():
        if value is not None and value != NEUTRAL.get(name):
            raise RequestError(
                f"generation_kwargs: {name}={value!r} is not supported; supported are until, max_gen_toks, do_sample, "
                "temperature, top_k and top_p"
            )
    return Sampled(temperature, top_k or None, top_p) if draws else Sampled()


def _watched(requests: Sequence[Item], what: str, silent: bool) -> Iterable[Item]:
    """Show the progress as the harness's other models do."""
    return tqdm(requests, desc=f"Running {what} requests", disable=silent)
