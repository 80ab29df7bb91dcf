package io.github.cracshim;

/** There was no checkpoint, or not all went well afterwards, and the program continues where it is. What resources threw is suppressed in it. */
public class CheckpointException extends Exception {
    private static final long serialVersionUID = 1L;

    /** Creates an exception without a message. */
    public CheckpointException() {
        super();
    }

    /**
     * Creates an exception.
     *
     * @param message what went wrong
     */
    public CheckpointException(String message) {
        super(message);
    }
}
