"""The command prepare."""

import os
from collections.abc import Sequence
from pathlib import Path

from gpt_jax.commands.arguments import ArgumentParser
from gpt_jax.config import DataConfig
from gpt_jax.data.documents import Documents, find_documents
from gpt_jax.data.prepare import prepare
from gpt_jax.data.token_files import known, open_tokens, verify
from gpt_jax.errors import UserError
from gpt_jax.monitor.terminal import LoadingBar
from gpt_jax.paths import expand

PURPOSE = """\
Tokenize texts once, into a folder that runs read in constant memory. The same
command continues where a killed one ended. Training takes the folder as
--config.data.path."""
EXAMPLES = ("texts --tokenizer bpe:8192 --out data/mine", "data/mine --verify")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the flags, and write or verify the folder."""
    parser = ArgumentParser("prepare", PURPOSE, EXAMPLES)
    flag = parser.add_argument
    flag("paths", type=Path, nargs="+", metavar="FILES", help="text files, folders, or patterns in quotes")
    flag("--tokenizer", metavar="NAME", default="char", help="char, byte, gpt2, bpe:N, or a tokenizer.json")
    flag("--out", type=Path, metavar="DIR", help="the folder to write")
    flag("--train_fraction", type=float, metavar="X", default=0.9, help="of the text (%(default)s)")
    flag("--verify", action="store_true", help="check every byte of a folder that was prepared")
    flags = parser.parse_args(arguments)
    paths = [expand(path) for path in flags.paths]
    if flags.verify:
        for path in paths:
            verify(path)
            print(f"verified   {path}: every byte is as it was prepared, every id in the vocabulary")
        return 0
    if flags.out is None:
        raise UserError("--out is missing: name the folder to write")
    DataConfig(train_fraction=flags.train_fraction)  # checks it
    out = expand(flags.out)
    for path in paths:
        if path.is_dir() and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(path)):
            raise UserError(f"out = {out} lies in the folder of texts {path}: name a folder outside")
    documents = [find_documents(path) for path in paths]
    files = tuple(file for part in documents for file in part.files)
    with LoadingBar() as progress:
        all_documents = Documents(files, sum(part.size for part in documents))
        prepare(all_documents, flags.tokenizer, out, flags.train_fraction, progress)
    data = open_tokens(out, [], flags.train_fraction, known)
    print(f"written    {out}: {len(data.train):,} training tokens, {len(data.val):,} validation tokens")
    print(
        f"tokenizer  {data.tokenizer.name}, vocabulary of {data.tokenizer.vocab_size:,}, split {data.split}"
    )
    print(f"to train   python -m gpt_jax train --config FILE --config.data.path={out}")
    return 0
