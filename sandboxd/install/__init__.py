"""Installing sandboxd as a systemd service: what is written where, what is run, and how all of it is taken back.

``texts`` holds the files, ``place`` which command the units start, ``subids`` the subordinate ids, ``steps`` the single
actions, ``plans`` which of them an installation has.
"""
