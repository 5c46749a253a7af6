"""Text encoders that report which words of a prompt are lost, and which are taken literally."""
import bisect
import re

from torch import Tensor

from flux_model import TextEncoders
from support.common import note, shorten

# commands in other programs: <lora:x:0.8>, (word:1.2), ((word)), [trigger], {a|b}, --w 512, ...
COMMAND = re.compile(
    r"<\w+:[^<>]*>|\([^()]*:\s*[\d.]+\)|\(\([^()]*\)\)|\[[^][]*\]|\{[^{}]*\}|__\w+__"
    r"|\bBREAK\b|\bembedding:\S+|(?<!\S)--\w+(?: [\d.]+)?")


class CheckedTextEncoders(TextEncoders):
    """Notes once per prompt: words that T5 cuts off or does not know, other programs' commands."""
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        encoded = super().encode(prompts)
        self.check(prompts)
        return encoded

    def check(self, prompts: list[str]) -> None:
        """One note of each kind: the first prompt that has such words, and how many do."""
        checked = self.__dict__.setdefault("checked", set())
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in checked]
        checked.update(new)
        kinds = [
            (self.lost_words, f"T5 sees {self.max_length} tokens: the part cut off from"),
            (self.unknown_words, "T5 has no letters for some words: the unknown part of"),
            (self.commands, "commands of other programs are plain text here: the command in"),
        ]
        for find_words, message in kinds:
            found = [prompt for prompt in new if find_words(prompt)]
            if found:
                others = f", the first of {len(found)} such prompts" if len(found) > 1 else ""
                note(f"{message} {shorten(found[0])} is {find_words(found[0])!r}{others}")

    def t5_ids(self, text: str) -> list[int]:
        # verbose=False: transformers would warn of the very thing that is looked for here
        return self.t5_tokenizer(text, verbose=False).input_ids

    def lost_words(self, prompt: str) -> str:
        """The end of a prompt that is cut off, from its first incomplete word, in one line."""
        def too_long(letters: int) -> bool:
            return len(self.t5_ids(prompt[:letters])) > self.max_length

        if not too_long(len(prompt)):
            return ""
        kept = bisect.bisect_left(range(len(prompt)), True, key=too_long) - 1
        start = 1 + max(prompt.rfind(blank, 0, kept + 1) for blank in " \n\t")
        return " ".join(prompt[start or kept:].split())

    def unknown_words(self, prompt: str) -> str:
        """The words with letters outside T5's vocabulary, such as all of Chinese."""
        unknown = self.t5_tokenizer.unk_token_id
        return " ".join(word for word in prompt.split() if unknown in self.t5_ids(word))

    @staticmethod
    def commands(prompt: str) -> str:
        """The parts that other programs would execute."""
        return " ".join(COMMAND.findall(prompt))
