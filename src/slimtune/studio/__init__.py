"""`slimtune studio`: a local web app over the library's own commands, for people who would rather look than type.

What a page does is a command that it shows and runs as a process of its own; all state is files in the runs' folder.

How a page is added (nothing else needs an edit):

    pages/NAME.py               PAGE = Page("NAME", "/NAME", order=40), and its routes: @PAGE.get("/NAME"), which take
                                `view: CurrentView` and give `view.render("NAME.html.j2", ...)`
    templates/NAME.html.j2      {% extends "base.html.j2" %} with a block `content`; no text but that of `t`, as in
                                t("runs.title"), no script or style of its own, for the browser is told to refuse
                                both; parts.html.j2 has macros
    texts/en.yaml, ko.yaml      a section NAME with `nav`, `title`, `lead` and the page's own keys, the same in both;
                                what the library has in English itself, as the help of a setting, is in the section
                                `library` of other languages, and a template takes it by the macro `said`

Long work is a command: `view.studio.jobs.add(NAME, [ARGUMENTS])` queues `slimtune ARGUMENTS` and gives a `Job`, whose
page is /runs/NAME. A short command whose answer a page shows is asked for by `view.studio.answers.ask(TAB,
[ARGUMENTS])` until it is there. Names of runs that come from the browser go through `view.studio.run_folder(name)`,
which raises for whatever lies outside of the folder. A SlimtuneError that a route raises is shown as its sentence. A
POST that takes a file is named in Page(uploads=("/NAME/PATH",)), or its body may have no more than a megabyte. A page
that is about one run says with Page(of_run="/NAME?run=") how the run's own page leads to it.
"""
