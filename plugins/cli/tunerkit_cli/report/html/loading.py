"""How to use what a run wrote: a few lines of Python, and a command."""

import json
import shlex
from typing import Final

import attrs

from tunerkit_cli.report.record import Run

_TEXT: Final = ('outputs = model(**processor("Some text.", return_tensors="pt"))',)
_IMAGE: Final = ('outputs = model(**processor(image, return_tensors="pt"))  # image: a PIL image',)
_WORDS: Final = (
    'words = ["Some", "words"]',
    'outputs = model(**processor(words, is_split_into_words=True, return_tensors="pt"))',
)
_PROMPT: Final = ('inputs = processor("Some text.", return_tensors="pt", return_token_type_ids=False)',)
_CHAT: Final = (
    'messages = [{"role": "user", "content": "Some text."}]',
    "inputs = processor.apply_chat_template(",
    '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
    ")",
)
_GENERATED: Final = "outputs = model.generate(**inputs, max_new_tokens=64, do_sample=False)"
_DECODED: Final = 'print(processor.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
_TARGET: Final = "print(processor.decode(outputs[0], skip_special_tokens=True))"


@attrs.frozen
class Loading:
    """Some lines of Python, and the command that predicts new rows."""

    python: str
    shell: str


def loading(run: Run) -> Loading:
    """Return how to load the run's folder; where the recipe doesn't name it, the folder is called ``OUT``."""
    out = run.recipe.get("out")
    folder = out if isinstance(out, str) and out else "OUT"
    name = json.dumps(folder, ensure_ascii=False)
    lines = ["import tunerkit", f"model, processor = tunerkit.from_folder({name})", *_call(run)]
    has_text = run.task not in ("image-classification", "token-classification")
    what = '--text "Some text."' if has_text else f"--data rows.{'csv' if 'image' in run.task else 'jsonl'}"
    return Loading("\n".join(lines), f"tunerkit predict {shlex.quote(folder)} {what}")


def _call(run: Run) -> tuple[str, ...]:
    """How the model is called: as `tunerkit predict` does, so a chat's message goes through its template."""
    if run.task in ("causal-lm", "preference"):
        return (*(_CHAT if run.conversations else _PROMPT), _GENERATED, _DECODED)
    if run.task == "seq2seq":
        return (*_PROMPT, _GENERATED, _TARGET)
    return {"image-classification": _IMAGE, "token-classification": _WORDS}.get(run.task, _TEXT)
