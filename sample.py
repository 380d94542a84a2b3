"""Write text with a trained model: `python sample.py --length 10000`."""

import argparse
import sys
from pathlib import Path

from gpt_jax.compilation import use_compilation_cache
from gpt_jax.config import ARTIFACTS
from gpt_jax.errors import run_main
from gpt_jax.run import WINDOWS
from gpt_jax.sampling import make_rules
from gpt_jax.write_samples import write_samples


def main() -> None:
    """Parse the flags and write the samples."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    flag = parser.add_argument
    flag("--length", type=int, default=10_000, help="characters to generate (%(default)s)")
    flag("--prompt", default="", help="text to continue")
    flag("--prompt_file", type=Path, help="a UTF-8 file that holds the text to continue")
    flag("--temperature", type=float, default=0.8, help="below 1 safer, above 1 wilder (%(default)s)")
    flag("--top_k", type=int, help="draw from the k likeliest characters")
    flag("--top_p", type=float, help="draw from the likeliest that hold this much probability")
    flag(
        "--min_p",
        type=float,
        help="draw from those at least this many times as likely as the likeliest",
    )
    flag("--greedy", action="store_true", help="always take the likeliest character")
    flag("--num_samples", type=int, default=1, help="texts to generate side by side (%(default)s)")
    flag("--seed", type=int, default=0, help="the same seed gives the same text (%(default)s)")
    flag("--which", choices=("best", "last"), default="best", help="checkpoint (%(default)s)")
    flag("--workdir", type=Path, help="a run, or an exported model (the newest run in artifacts/)")
    flag("--out", type=Path, default=ARTIFACTS / "output.txt", help="file to write (%(default)s)")
    flag("--window", choices=WINDOWS, default=WINDOWS[0], help="what is seen past the context")
    flag("--show", type=int, default=500, help="characters to show on the terminal (%(default)s)")
    flags = vars(parser.parse_args())
    use_compilation_cache()
    names = ("temperature", "top_k", "top_p", "min_p", "greedy")
    write_samples(rules=make_rules(**{name: flags.pop(name) for name in names}), **flags)


if __name__ == "__main__":
    sys.exit(run_main(main))
