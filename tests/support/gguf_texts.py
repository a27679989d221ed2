"""Texts that tokenizers disagree about."""

from conftest import SENTENCES

TEXTS = [
    *SENTENCES,
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "it's I'LL don't x'RE they'Ve 'tis",
    "1234567 apples, 12.5%; 3x4 = 12 and 007",
    "  two spaces,\ttabs\t\t, and\n\n\n  lines \r\n \n end  ",
    "Ünïcödé — «naïve» 蓝天 🟦🟦 नमस्ते ٣٤٥ ½ ² Ⅷ ǅ don't",
    "CamelCaseWords and HTTPServer/path//to/\n\nfile_name.txt !!! ...\n",
]
