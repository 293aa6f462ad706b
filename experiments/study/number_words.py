"""What is known of numbers in English and French words: how many digits, and which word says which.

So the claims on translation can sort numbers by length, and can say where attention should be.
"""

import re
from collections.abc import Sequence

ONES = {"one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}
ONES |= {"un", "deux", "trois", "quatre", "cinq", "sept", "huit", "neuf"}
TEENS = {"ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"}
TEENS |= {"eighteen", "nineteen", "onze", "douze", "treize", "quatorze", "quinze", "seize"}
TENS = {"twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety", "dix"}
TENS |= {"vingt", "vingts", "trente", "quarante", "cinquante", "soixante"}
HUNDRED = {"hundred", "cent", "cents"}
SCALES = {"thousand": 3, "mille": 3, "million": 6, "millions": 6}

Part = tuple[int, str]
"""A group of three digits, by the power of ten that it counts, and what of it is said."""


def parts(words: Sequence[str]) -> list[frozenset[Part]]:
    """Which parts of the number each word says; none for what says no part of it.

    A group of three digits has five parts: the digit of the hundreds, the word "hundred", the
    tens, the ones, and the scale ("thousand", "million"). "Twelve" says tens and ones at once. In
    French "soixante-douze" (72) the first word says tens, the second tens and ones; the first two
    of "quatre-vingt-six" (86) both say tens. "And", "et", commas and the end symbol say nothing.

    Two words that share a part translate one another.

    Args:
      words: of one number; a hyphen before a word is as good as none.
    """
    words = [word.strip("-") for word in words]
    power, found = 0, []
    for word, after in reversed(list(zip(words, [*words[1:], ""], strict=True))):
        said: tuple[str, ...] = ()
        if word in SCALES:
            power, said = SCALES[word], ("scale",)
        elif word in HUNDRED:
            said = ("hundred",)
        elif word in ONES and after in HUNDRED:
            said = ("hundreds",)
        elif word == "quatre" and after in ("vingt", "vingts"):
            said = ("tens",)
        elif word in ONES:
            said = ("ones",)
        elif word in TEENS:
            said = ("tens", "ones")
        elif word in TENS:
            said = ("tens",)
        found.append(frozenset((power, part) for part in said))
    return found[::-1]


def num_digits(text: str) -> int:
    """Digits of a number in English words."""
    words = re.findall("[a-z]+", text)
    digits = {"ones": 1, "tens": 2, "hundreds": 3}
    return max(
        power + digits[part] for said in parts(words) for power, part in said if part in digits
    )
