"""Text encoders that say what they do not see, and what they take literally."""
import bisect
import re

from torch import Tensor

from flux_model import TextEncoders
from support.common import note, shorten

# what other programs take for commands: <lora:x:0.8>, (word:1.2), ((word)), [trigger], {a|b}, --w 512, ...
COMMAND = re.compile(r"<\w+:[^<>]*>|\([^()]*:\s*[\d.]+\)|\(\([^()]*\)\)|\[[^][]*\]|\{[^{}]*\}|__\w+__"
                     r"|\bBREAK\b|\bembedding:\S+|(?<!\S)--\w+(?: [\d.]+)?")


class LoudTextEncoders(TextEncoders):
    """Notes, once for each prompt, what T5 has no room for or does not know, and other programs' commands."""
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        encoded = super().encode(prompts)
        self.tell(prompts)
        return encoded

    def tell(self, prompts: list[str]) -> None:
        """The notes on all of these: one of each kind, with the first prompt and the number of others."""
        told = self.__dict__.setdefault("told", set())
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in told]
        told.update(new)
        for find, what in ((self.lost_words, f"T5 sees {self.max_length} tokens: lost of"),
                           (self.unknown_words, "what T5 has no letters for, so takes for one unknown, in"),
                           (self.commands, "what other programs take for commands, and is text here, in")):
            found = {prompt: words for prompt in new if (words := find(prompt))}
            for prompt in [*found][:1]:
                others = f", the first of {len(found)} such prompts" if len(found) > 1 else ""
                note(f"{what} {shorten(prompt)} is {found[prompt]!r}{others}")

    def lost_words(self, prompt: str) -> str:
        """The end of a prompt that is cut off, from the first word that is not whole, in one line."""
        def too_long(letters: int) -> bool:
            # not verbose: transformers would warn of what is looked for here
            return len(self.t5_tokenizer(prompt[:letters], verbose=False).input_ids) > self.max_length

        if not too_long(len(prompt)):
            return ""
        seen = bisect.bisect_left(range(len(prompt)), True, key=too_long) - 1
        start = max(prompt.rfind(blank, 0, seen + 1) for blank in " \n\t") + 1
        return " ".join(prompt[start or seen:].split())

    def unknown_words(self, prompt: str) -> str:
        """The words with letters that are not in T5's vocabulary, which has no Chinese, for example."""
        def unknown(text: str) -> bool:
            return self.t5_tokenizer.unk_token_id in self.t5_tokenizer(text, verbose=False).input_ids

        return " ".join(filter(unknown, prompt.split())) if unknown(prompt) else ""

    @staticmethod
    def commands(prompt: str) -> str:
        """What other programs would not take for words."""
        return " ".join(COMMAND.findall(prompt))
