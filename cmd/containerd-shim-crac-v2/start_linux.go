package main

/*
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

// answerFD is where the answer to `start` goes; -1: this is no shim that starts.
int answerFD = -1;

// containerd's call `start` has to end while the shim runs on. So it forks, before there is a
// Go runtime that could not be forked: the child is the shim, and this process waits for the
// child's answer, hands it on, and ends. To execute the program once more, for the shim, would
// take some ten milliseconds of CPU.
static void answerStart(int from, pid_t shim)
{
	char answer[4096]; // an address, which is written at once
	ssize_t n;
	int status;
	do {
		n = read(from, answer, sizeof(answer));
	} while (n < 0 && errno == EINTR);
	if (n > 0)
		_exit(write(STDOUT_FILENO, answer, n) == n ? 0 : 1);
	// It has said why on standard error.
	while (waitpid(shim, &status, 0) < 0 && errno == EINTR)
		;
	_exit(WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : 1);
}

static void fail(void)
{
	perror("containerd-shim-crac-v2: start");
	_exit(1);
}

// reserve takes the descriptors that containerd's package expects the shim's sockets at, before
// Go uses them for something else, and gives what fd has become behind them.
static int reserve(int fd)
{
	int moved = fcntl(fd, F_DUPFD_CLOEXEC, 5);
	int null;
	if (moved < 0)
		fail();
	close(fd);
	do {
		null = open("/dev/null", O_RDWR | O_CLOEXEC);
		if (null < 0)
			fail();
	} while (null < 4);
	if (null > 4)
		close(null);
	return moved;
}

// Before main, and so before Go.
__attribute__((constructor)) static void start(int argc, char **argv)
{
	int answer[2];
	pid_t shim;
	if (argc < 2 || strcmp(argv[argc - 1], "start") != 0)
		return;
	if (pipe2(answer, O_CLOEXEC) < 0 || (shim = fork()) < 0)
		fail();
	if (shim > 0) {
		close(answer[1]);
		answerStart(answer[0], shim);
	}
	close(answer[0]);
	answerFD = reserve(answer[1]);
	// Who lists processes is not to take it for a call that does not end.
	memset(argv[argc - 1], 0, strlen(argv[argc - 1]));
}
*/
import "C"

import "os"

// starts gives the arguments of containerd's call `start` and where its answer goes, if this
// process is the shim that the call leaves behind.
func starts() (args []string, answer *os.File, ok bool) {
	if C.answerFD < 0 {
		return nil, nil, false
	}
	return os.Args[1 : len(os.Args)-1], os.NewFile(uintptr(C.answerFD), "answer"), true
}
