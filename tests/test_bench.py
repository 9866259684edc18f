import nbformat

from helpers.study.bench import step_times, wall_time


def test_wall_time_is_told_by_notebook_and_by_what_takes_longest_in_it(tmp_path):
    cell = nbformat.v4.new_code_cell
    sources = {"import torch": 3.0, "x = train()": 60.0, "plot(x)": 1.0}
    cells = [cell(text, metadata={"papermill": {"duration": took}}) for text, took in sources.items()]
    whole = nbformat.v4.new_notebook(cells=cells, metadata={"papermill": {"duration": 70.0}})
    (tmp_path / "notebooks").mkdir()
    nbformat.write(whole, tmp_path / "notebooks" / "01_train.ipynb")
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "notebooks" / "interrupted.ipynb")
    assert wall_time(tmp_path).values.tolist() == [["01_train", 70.0, 6.0, 3.0, 60.0, "x = train()"]]


def test_the_time_of_a_notebook_is_told_by_its_headings(tmp_path):
    text, cell = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    cells = [text("# All"), cell("a", metadata={"papermill": {"duration": 1.0}}), text("read\n\n## Part"), cell("b")]
    cells += [
        cell("c", metadata={"papermill": {"duration": 2.0}}),
        cell("d", metadata={"papermill": {"duration": 3.0}}),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "done.ipynb")
    assert step_times(tmp_path / "done.ipynb") == {"All": 1.0, "Part": 5.0}
