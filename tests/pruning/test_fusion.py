"""Last Layer Fusion: how pruned tokens are restored, and that the whole map is there."""

import copy
import re

import pytest
import torch
from helpers.models import FAMILIES, reference_vit, timm_vit
from torch import nn

import cropr_kernels as cropr
