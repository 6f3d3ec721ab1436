"""tiktoken's Encoding for text with any number of spaces or line breaks in a row."""

import re

import tiktoken

# To take a run of white space but for its last character, `\s+(?!\S)`, tiktoken keeps each
# character on a stack of 1,000,000: from 999,999 on it panics, with an exception that is no
# `Exception`. Source: fancy-regex, src/vm.rs, MAX_STACK; openai/tiktoken#15
LONGEST_RUN = 100_000
WHITE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s of Unicode
LONG_RUN = re.compile(f"(?<![{WHITE}])[{WHITE}]{{{LONGEST_RUN},}}")


class LongTextEncoding(tiktoken.Encoding):
    """Also encodes what makes tiktoken panic, to the ids that GPT-2's pattern says."""

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text; it is cut before the last character of a long run of white space,
        where the pattern splits anyway. At the end of a text, a run needs no stack."""
        ids, start = [], 0
        for run in LONG_RUN.finditer(text) if len(text) > LONGEST_RUN else ():
            if run.end() < len(text):
                ids += super().encode_ordinary(text[start : run.end() - 1])
                start = run.end() - 1
        return ids + super().encode_ordinary(text[start:])
