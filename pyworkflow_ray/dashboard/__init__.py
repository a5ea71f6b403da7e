"""`pyworkflow-ray dashboard`: runs and breakers in a browser. Server-rendered, works offline, no build step.

`server` serves what `app` puts together; `guard` stands before all of it; `pages` answers, `parts` draws, `live` tells
what has changed since; `looks` reads the storage; `actions` acts through `cluster`, whose `hands` is the one process
that touches Ray. What is shown of a run is `explain`'s view of it, as everywhere: nothing here says what a run is at.
"""
