"""Write scikit-learn's 1,797 handwritten digits (8x8 pixels) as CSV for the C++ examples.

One line per image: 64 pixels in 0..16, row by row, then the label in 0..9. No header.

    python examples/cpp/write_digits_csv.py out/digits.csv
"""

import argparse
import os
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits


def main() -> None:
    """Write the file named on the command line, by a temporary one that is renamed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    path = parser.parse_args().path

    digits = load_digits()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    np.savetxt(temporary, np.column_stack([digits.data, digits.target]), fmt="%d", delimiter=",")
    temporary.replace(path)
    print(f"{path}: {len(digits.target)} images")


if __name__ == "__main__":
    main()
