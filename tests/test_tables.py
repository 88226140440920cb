from alexnet_jax import AlexNet
from alexnet_jax.summary import layer_summary
from alexnet_jax.tables import table


def test_the_layers_of_the_paper_as_a_table():
    lines = layer_summary(AlexNet(), (224, 224, 3)).splitlines()
    assert lines[2].split() == ["conv1", "55×55×96", "11×11×3×96", "34,944"]
    assert lines[-1].split() == ["total", "60,965,224"]


def test_a_table_in_markdown_and_as_text():
    rows = [("a", 1), ("bc", 20)]
    assert table(rows, ("x", "n"), markdown=True) == "| x | n |\n| --- | --- |\n| a | 1 |\n| bc | 20 |"
    assert table(rows, ("x", "n")) == "x    n\n--  --\na    1\nbc  20"
