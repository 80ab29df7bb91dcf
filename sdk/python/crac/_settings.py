"""What a program may switch off."""


class Settings:
    """Read at each notification, so that they may be changed at any time."""

    #: After a restore, give the random generators new seeds (crac.reseed).
    reseed = True
    #: After a restore, put into os.environ what this start's request changed.
    environ = True


settings = Settings()
