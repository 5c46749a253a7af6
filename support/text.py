"""Which words of a prompt T5 cuts off or does not know, and which are only taken literally."""
import re
from typing import Any

from flux_model import TextEncoders
from support.common import note, shorten

# commands in other programs: <lora:x:0.8>, (word:1.2), ((word)), [trigger], {a|b}, --w 512, ...
COMMAND = re.compile(
    r"<\w+:[^<>]*>|\([^()]*:\s*[\d.]+\)|\(\([^()]*\)\)|\[[^][]*\]|\{[^{}]*\}|__\w+__"
    r"|\bBREAK\b|\bembedding:\S+|(?<!\S)--\w+(?: [\d.]+)?")


def check_prompts(encoders: TextEncoders, prompts: list[str]):
    """Notes words that T5 cuts off or does not know, and commands of other programs: of each kind
    the first prompt that has such words, and how many do. ValueError for one that is not UTF-8."""
    try:
        "".join(prompts).encode()
    except UnicodeEncodeError:                   # lone surrogates
        raise ValueError("a prompt is not valid UTF-8 text") from None
    kinds = {
        f"T5 sees {encoders.max_length} tokens: the part cut off from": lost_words,
        "T5 has no letters for some words: the unknown part of": unknown_words,
        "commands of other programs are plain text here: the command in": commands,
    }
    for message, find_words in kinds.items():
        found = [prompt for prompt in dict.fromkeys(prompts) if find_words(prompt, encoders)]
        if found:
            others = f", the first of {len(found)} such prompts" if len(found) > 1 else ""
            words = find_words(found[0], encoders)
            note(f"{message} {shorten(found[0])} is {words!r}{others}")


def t5_tokens(text: str, encoders: TextEncoders) -> Any:
    # verbose=False: transformers would warn of the very thing that is looked for here
    return encoders.t5_tokenizer(text, verbose=False, return_offsets_mapping=True)


def lost_words(prompt: str, encoders: TextEncoders) -> str:
    """The end of a prompt that is cut off, from its first incomplete word, in one line."""
    tokens = t5_tokens(prompt, encoders)
    if len(tokens.input_ids) <= encoders.max_length:
        return ""
    # where the first token that is cut off begins; the end token takes the last place
    cut, _ = tokens.offset_mapping[encoders.max_length - 1]
    start = re.search(r"\S*\Z", prompt[:cut]).start()
    return " ".join(prompt[start or cut:].split())


def unknown_words(prompt: str, encoders: TextEncoders) -> str:
    """The words with letters outside T5's vocabulary, such as all of Chinese."""
    unknown = encoders.t5_tokenizer.unk_token_id
    words = prompt.split()
    return " ".join(word for word in words if unknown in t5_tokens(word, encoders).input_ids)


def commands(prompt: str, encoders: TextEncoders) -> str:
    """The parts that other programs would execute."""
    return " ".join(COMMAND.findall(prompt))
