"""Long functions are seen where they are planted, and nowhere else."""

from __future__ import annotations

import pytest
from support.function_lengths import functions, long_functions

CPP = """\
// a comment with a brace {
#define MACRO(a) \\
    {            \\
        a        \\
    }
namespace hesd {
namespace {

const Table kTable[] = {
    {"{", 1},
    {"}", 2},
};

constexpr char kBrace = '{';

struct Shape : public Base {
    int rows = 0;

    [[nodiscard]] int area() const { return rows * columns; }
    [[nodiscard]] int inside() const {
        return rows;
    }

   private:
    int columns{1};
};

}  // namespace

template <typename T, typename U = std::vector<T>>
LAUNCH_BOUNDS(256, 1)
    planted(const T& first,
            int second) {
    for (int i = 0; i < second; ++i) {
        const auto lambda = [&] {
            return R"(
)";
        };
        lambda();
    }
}

Shape::Shape(int rows) : Base{rows}, rows(rows) {
    columns = 2;
}

}  // namespace hesd

MODULE(engine, module) {
    module.run();
}
"""

PYTHON = '''\
def planted(a):
    """Five lines.

    """
    return a


class Holder:
    @property
    def short(self):
        async def inside():
            return 1
        return inside
'''


def test_functions_of_cpp_are_found_with_all_their_lines(tmp_path):
    path = tmp_path / "planted.cpp"
    path.write_text(CPP, encoding="utf-8")
    found = {function.name: function.lines for function in functions(path)}
    assert found == {"inside": 3, "planted": 12, "Shape::Shape": 3, "MODULE": 3}
    assert [str(function) for function in long_functions([path], 11)] == [f"{path}:30: planted has 12 lines"]
    assert long_functions([path], 12) == []


def test_functions_of_python_are_found_with_their_docstrings(tmp_path):
    path = tmp_path / "planted.py"
    path.write_text(PYTHON, encoding="utf-8")
    found = {function.name: function.lines for function in functions(path)}
    assert found == {"planted": 5, "short": 4, "inside": 2}
    assert [function.name for function in long_functions([path], 3)] == ["planted", "short"]


def test_braces_that_do_not_balance_are_not_passed_over(tmp_path):
    path = tmp_path / "planted.hpp"
    path.write_text("void f() {\n", encoding="utf-8")
    with pytest.raises(ValueError, match="1 braces are not closed"):
        list(functions(path))
