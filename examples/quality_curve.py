"""The quality curve: what every method loses at every size of the cache. Cells run one by one in an editor, or all.

python examples/quality_curve.py
python examples/quality_curve.py --model FOLDER --text FILE.txt --calibration OTHER.txt --plot quality.svg
"""

# %% What to measure: methods, sizes, and texts that the model may know but the conversions do not.
from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from story_grammar import HELD_OUT_SEEDS, SEPARATOR, TRAIN_SEEDS, stories

from mla_compile.evaluation.measure import Sample
from mla_compile.evaluation.trial import measure_conversions, read_trials

HERE = Path(__file__).parent

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(HERE / "tiny-llama"), help="a folder or a hub id")
parser.add_argument("--text", type=Path, help="text to measure on; unseen stories by default")
parser.add_argument("--calibration", help="text to convert by; other stories by default")
parser.add_argument("--methods", default="fisher,mha2mla")
parser.add_argument("--ratios", default="0.5,0.25")
parser.add_argument("--tokens", type=int, default=4096, help="tokens to measure on, and to calibrate on")
parser.add_argument("--plot", type=Path, help="a .svg or .png file (needs matplotlib)")
options = parser.parse_args()

# %% Two texts.
scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)
for name, seeds in {"unseen.txt": HELD_OUT_SEEDS[:60], "seen.txt": TRAIN_SEEDS[:60]}.items():
    (folder / name).write_text(f"\n{SEPARATOR}\n".join(stories(seeds)))
text, calibration = options.text or folder / "unseen.txt", options.calibration or str(folder / "seen.txt")

# %% Convert by every method at every size, nothing written, and run each beside the original.
result = measure_conversions(
    options.model,
    Sample(text, seq_len=256, max_tokens=options.tokens),
    read_trials(options.methods, options.ratios, True, options.tokens),
    calibration=calibration,
)

# %% The table.
print(f"{'method':<10}{'kept':>8}{'perplexity':>12}{'ratio':>8}{'KL':>8}{'top-1':>8}")
print(f"{'original':<10}{1:>8.1%}{result.original.found.perplexity.value:>12.3f}{1:>8.3f}")
for measured in result.models:
    found = measured.found
    kept, ratio = measured.kept(result.original), measured.ratio(result.original)
    print(
        f"{measured.model.method:<10}{kept:>8.1%}{found.perplexity.value:>12.3f}{ratio:>8.3f}{found.kl:>8.3f}", end=""
    )
    print(f"{found.top1:>8.1%}")

# %% The curve.
if options.plot:
    from mla_compile.evaluation.plot import draw

    draw(result, options.plot)
    print(f"drawn: {options.plot}")
scratch.cleanup()
