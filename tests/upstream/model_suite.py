"""The common model tests of transformers for one host.

The source distribution leaves out two sets that the common tests inherit from or look for: those of ``generate()`` and
of ``torch.export``. Empty classes stand in for them.
"""

from __future__ import annotations

import unittest
from contextlib import nullcontext
from typing import Any

from tests.upstream.attaching import attached_at_birth
from tests.upstream.hosts import ModelTester
from tests.upstream.outcomes import Outcomes, run_all
from tests.upstream.reviewed import LEFT_OUT
from tests.upstream.sdist import fetch, import_tests

_MISSING = {
    ".exporters": {},
    ".exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    ".generation": {},
    ".generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
}


def model_tests() -> type[Any]:
    """``ModelTesterMixin`` of the installed version."""
    module = import_tests(fetch("transformers"), "transformers_tests", "test_modeling_common", _MISSING)
    return module.ModelTesterMixin


def run_model_tests(mixin: type[Any], host: str, *, attached: bool) -> Outcomes:
    """The outcomes of all tests on one host."""
    tester = ModelTester(host)
    model_class = tester.host.model_class
    contents = {
        "model_tester": tester,
        "all_model_classes": (model_class,),
        "_is_composite": True,
        # Their shape checks are for towers that give one row per image.
        "skip_test_image_features_output_shape": True,
        "skip_test_video_features_output_shape": True,
        # The last norm of CLIP and SigLIP makes no image token.
        "test_all_params_have_gradient": not host.startswith("llava"),
    }
    case: Any = type(f"{model_class.__name__}Test", (mixin, unittest.TestCase), contents)
    with attached_at_birth(model_class) if attached else nullcontext():
        return run_all(case, [n for n in unittest.defaultTestLoader.getTestCaseNames(case) if n not in LEFT_OUT])
