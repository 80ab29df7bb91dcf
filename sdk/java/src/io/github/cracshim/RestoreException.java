package io.github.cracshim;

/** The program was restored, and not all resources could continue. What resources threw is suppressed in it. */
public class RestoreException extends Exception {
    private static final long serialVersionUID = 1L;

    /** Creates an exception without a message. */
    public RestoreException() {
        super();
    }

    /**
     * Creates an exception.
     *
     * @param message what went wrong
     */
    public RestoreException(String message) {
        super(message);
    }
}
