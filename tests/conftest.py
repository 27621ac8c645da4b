import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the network; those of the hub path set up their own cache
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
