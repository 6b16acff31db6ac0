"""What every test here needs: nodes find `ill`, nothing goes to Flower's makers, one thread."""

import os, sys
from pathlib import Path
import torch

HERE = Path(__file__).resolve().parent
os.environ |= dict(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")
path = [str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(path)
sys.path.insert(0, str(HERE))
torch.set_num_threads(1)
