"""tiktoken's Encoding for text with any number of spaces or line breaks in a row."""

import re

import tiktoken

# To take a run of white space but for its last character, `\s+(?!\S)`, tiktoken keeps each
# character on a stack of 1,000,000: from 999,999 on it panics, with an exception that is no
# `Exception`. Source: fancy-regex, src/vm.rs, MAX_STACK; openai/tiktoken#15
LONGEST_RUN = 100_000
WHITE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s of Unicode
# Before the last character of a long run, where the pattern splits anyway. At the end of a text, a
# run needs no stack.
CUT = re.compile(f"(?=[{WHITE}][^{WHITE}])(?<=[{WHITE}]{{{LONGEST_RUN}}})")


class LongTextEncoding(tiktoken.Encoding):
    """Also encodes what makes tiktoken panic, to the ids that GPT-2's pattern says."""

    def encode_ordinary(self, text: str) -> list[int]:
        encode = super().encode_ordinary
        if len(text) <= LONGEST_RUN:
            return encode(text)
        return [id_ for piece in CUT.split(text) for id_ in encode(piece)]
