"""Text encoders that say what they do not see."""
import bisect

from torch import Tensor

from flux_model import TextEncoders
from support.common import note, shorten


class LoudTextEncoders(TextEncoders):
    """Notes, once for each prompt, the words that T5 has no room for; they are cut off."""
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        encoded, told = super().encode(prompts), self.__dict__.setdefault("told", set())
        for prompt in {*prompts} - told if not isinstance(prompts, str) else ():
            told.add(prompt)
            if lost := self.lost_words(prompt):
                note(f"T5 sees {self.max_length} tokens: lost of {shorten(prompt)} is {lost!r}")
        return encoded

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
