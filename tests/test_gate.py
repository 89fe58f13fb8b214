"""The gate: what it reads out of machine code and lets pass, and that it runs every test."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "loops.py"
if not SCRIPT.is_file():
    pytest.skip("not in a clone", allow_module_level=True)
spec = importlib.util.spec_from_file_location("loops", SCRIPT)
loops = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loops)

# Four loops as objdump prints them: a vector loop, its scalar remainder, a loop of two blocks, one without vectors.
DISASSEMBLY = """
0000000000000010 <step>:
      10:\tvbroadcastss (%rdx),%ymm3
      14:\tvmovups (%rcx,%rax,1),%ymm0
      18:\tvmulps 0x0(%rip),%ymm0,%ymm1        # 20 <step+0x10>
      1c:\tvsqrtps %ymm1,%ymm1
      20:\tvdivps %ymm1,%ymm0,%ymm0
      24:\tvmovups %ymm0,(%rdi,%rax,1)
      28:\tadd    $0x20,%rax
      2c:\tcmp    %rax,%rsi
      30:\tjne    14 <step+0x4>
      34:\tvmovss (%rcx,%rax,4),%xmm0
      38:\tvdivss %xmm1,%xmm0,%xmm0
      3c:\tvmovss %xmm0,(%rdi,%rax,4)
      40:\tadd    $0x1,%rax
      44:\tjne    34 <step+0x24>
      48:\tvaddps (%rcx),%ymm0,%ymm0
      4c:\tje     50 <step+0x40>
      50:\tadd    $0x20,%rcx
      54:\tjne    48 <step+0x38>
      58:\tmov    (%rcx),%eax
      5c:\tadd    $0x4,%rcx
      60:\tjne    58 <step+0x48>
      64:\tvmovaps %ymm0,(%rsp)
      68:\tret
      6c:\tjmp    64 <step+0x54>
"""


def test_the_loops_of_one_block_with_vectors_are_found():
    found = list(loops.vector_loops(DISASSEMBLY))
    assert [(function, address) for function, address, _ in found] == [("step", "30"), ("step", "44")]
    vector, scalar = (instructions for _, _, instructions in found)
    assert vector[1] == "vmulps 0x0(%rip),%ymm0,%ymm1"
    assert loops.width(vector) == 32
    assert loops.count(vector, 4) == [8, 8, 2]
    assert loops.width(scalar) == 16
    assert loops.count(scalar, 4) == [5, 1, 1]


@pytest.mark.parametrize(
    ("lines", "size", "elements"),
    [
        ("movups (%rcx),%xmm0; add $0x10,%rcx", 4, 4),  # a pointer
        ("movups (%rcx,%rax,8),%xmm0; add $0x2,%rax", 8, 2),  # a scaled index
        ("movups 0x10(%rcx,%rax,1),%xmm0; add $0x20,%rax", 4, 8),  # two vectors an iteration
        ("movups -0x80(%rcx),%xmm0; sub $0xffffffffffffff80,%rcx", 8, 16),  # how 128 is added in one byte
        ("movq (%rsi),%xmm0; movups %xmm0,(%rdi); add $0x8,%rsi; add $0x10,%rdi", 4, 4),  # the widest array counts
        ("movups (%rsp),%xmm0; add $0x1,%rax", 4, 0),  # no array
    ],
)
def test_the_elements_of_an_iteration_come_from_its_steps(lines, size, elements):
    assert loops.count(lines.split("; "), size)[1] == elements


def test_divisions_are_counted_per_element():
    lines = ["vdivpd %zmm1,%zmm0,%zmm0", "vsqrtpd (%rcx),%zmm2", "vdivpd %zmm3,%zmm0,%zmm0", "add $0x40,%rcx"]
    assert loops.count(lines, 8) == [4, 8, 3]


C = """
static CYTHON_INLINE void __pyx_fuse_1__pyx_f_3_v3_adam_loop(Py_ssize_t __pyx_v_n, double *__pyx_v_p, float const *__pyx_v_g, signed char *__pyx_v_q, int __pyx_v_amsgrad, __pyx_t_3_v3_Mode __pyx_v_mode) {
  /* "rules.pxi":9
 *     for i in range(n):             # <<<<<<<<<<<<<<
 */
  for (__pyx_t_3 = 0; __pyx_t_3 < __pyx_t_2; __pyx_t_3+=1) {
    (__pyx_v_p[__pyx_v_i]) = (__pyx_v_g[__pyx_v_i]);
  }
}
static void __pyx_f_3_v3_adam(int __pyx_v_n) {
  __pyx_fuse_1__pyx_f_3_v3_adam_loop(__pyx_v_n, __pyx_v_p, __pyx_v_g, __pyx_v_q, 1, __pyx_e_3_v3_HAT_ON);
}
"""


def test_a_loop_is_known_by_its_function_its_dtype_and_the_constants_of_its_call_not_by_lines():
    for shift in (0, 7):
        found = loops.source_loops("\n" * shift + C)
        call = {11 + shift: "(amsgrad=1, mode=HAT_ON)"}
        assert found == {"__pyx_fuse_1__pyx_f_3_v3_adam_loop": ("adam_loop float64", 6 + shift, 8 + shift, 8, call)}


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ([40, 8, 2.0], None),
        ([42, 8, 2.0], None),  # 5%
        ([21, 4, 2.0], None),  # the same per element
        ([43, 8, 2.0], "v3: adam: 5.375 instructions per element (43 for 8), recorded 5.000 (40 for 8), bound 5.250"),
        ([20, 2, 2.0], "v3: adam: 10.000 instructions per element (20 for 2), recorded 5.000 (40 for 8), bound 5.250"),
        ([40, 8, 3.0], "v3: adam: 3 divisions and square roots per element, recorded 2"),
        (None, "v3: adam: not in the build; if that is on purpose, run python .ci/loops.py --record"),
    ],
)
def test_what_passes(now, message):
    wrong = list(loops.compare({"v3": {"adam": now} if now else {}}, {"v3": {"adam": [40, 8, 2.0]}}))
    assert wrong == ([message] if message else [])


def test_a_short_loop_may_take_one_instruction_more_and_a_new_one_must_be_recorded():
    then = {"v3": {"sgd": [7, 8, 0.0]}}
    assert not list(loops.compare({"v3": {"sgd": [8, 8, 0.0]}}, then))
    assert len(list(loops.compare({"v3": {"sgd": [9, 8, 0.0]}}, then))) == 1
    assert list(loops.compare({**then, "v4": {"new": [1, 8, 0.0]}}, then)) == [
        "v4: new: not in the record; if that is on purpose, run python .ci/loops.py --record"
    ]


# --- tests that need modules which the gate installs later -------------------------------------------------------------

LATER = """
import sys
import pytest
sys.modules["torch"] = None  # nor is there a module blue

def test_plain(): pass
@pytest.mark.later("sys")
def test_marked(): pass
@pytest.mark.later("sys", "blue")
def test_skipped(): pass
def test_unmarked(): pytest.importorskip("torch")
@pytest.mark.skipif(True, reason="no thinc here")
def test_unmarked_too(): pass
@pytest.mark.later("sys")
def test_lacking(): pytest.importorskip("torch")
def test_other(): pytest.importorskip("blue")
"""


def test_tests_that_run_later_are_marked(tmp_path):
    """Those that are marked are selected; a test that is skipped for such a module without the mark fails or is an error."""
    folder = Path(__file__).parent
    shutil.copy(folder / "conftest.py", tmp_path)
    (tmp_path / "test_later.py").write_text(LATER)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = later\n")

    def outcomes(*arguments):
        command = [sys.executable, "-P", "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return dict(re.findall(r"::test_(\w+) (\w+)", done.stdout))

    later = {"marked": "PASSED", "skipped": "SKIPPED", "lacking": "SKIPPED"}
    assert outcomes("-m", "later") == {**later, "lacking": "FAILED"}
    others = {"plain": "PASSED", "unmarked": "FAILED", "unmarked_too": "ERROR", "other": "SKIPPED"}
    assert outcomes() == {**later, **others}


def test_files_that_need_such_a_module_as_a_whole_are_marked():
    for path in Path(__file__).parent.glob("test_*.py"):
        text = path.read_text()
        if re.search(r"""^(\w+ = )?(pytest\.importorskip|needs)\("(torch|thinc)""", text, re.M):
            assert re.search(r"^pytestmark = (\[\s*)?pytest\.mark\.later\(", text, re.M), path
