/* The workload of the tests: it holds memory with contents that can be told from
 * where they are, and does to it what it reads from a pipe, one command to a line.
 *
 * usage: workload DIR NAME    (pipes DIR/NAME.in and DIR/NAME.out)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define REGIONS 64
#define PAGE 4096UL
#define WORDS (PAGE / 8)

static struct region {
	char *at;
	long pages;
} regions[REGIONS];

static const char *dir;

static uint64_t word(int region, long page, long i)
{
	uint64_t x = (uint64_t)region << 56 ^ (uint64_t)page << 16 ^ (uint64_t)i;

	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ x >> 27) * 0x94d049bb133111ebULL;
	return (x ^ x >> 31) | 1; /* never zero */
}

static void fill(int r, long from, long n)
{
	for (long p = from; p < from + n; p++) {
		uint64_t *w = (uint64_t *)(regions[r].at + p * PAGE);

		for (unsigned long i = 0; i < WORDS; i++)
			w[i] = word(r, p, i);
	}
}

/* first page in [from, from+n) that does not hold what region `as` would hold,
 * or zeroes; -1 if all are right */
static long wrong(int r, int as, long from, long n, int zero)
{
	for (long p = from; p < from + n; p++) {
		uint64_t *w = (uint64_t *)(regions[r].at + p * PAGE);

		for (unsigned long i = 0; i < WORDS; i++)
			if (w[i] != (zero ? 0 : word(as, p, i)))
				return p;
	}
	return -1;
}

struct toucher {
	pthread_t thread;
	int r;
	unsigned seed;
	long bad;
};

static void *touch(void *arg)
{
	struct toucher *t = arg;
	long n = regions[t->r].pages;

	for (long i = 0; i < n && t->bad < 0; i++)
		t->bad = wrong(t->r, t->r, rand_r(&t->seed) % n, 1, 0);
	return NULL;
}

/* Threads that read pages in random order, all at once. */
static long threads(int r, int n)
{
	struct toucher t[64];
	long bad = -1;

	for (int i = 0; i < n; i++) {
		t[i] = (struct toucher){ .r = r, .seed = i, .bad = -1 };
		pthread_create(&t[i].thread, NULL, touch, &t[i]);
	}
	for (int i = 0; i < n; i++) {
		pthread_join(t[i].thread, NULL);
		if (t[i].bad >= 0)
			bad = t[i].bad;
	}
	return bad;
}

/* Random use of one region, against a book of what must be where: it says for each
 * page of which page it has the contents, or -1 for zeroes. */
static long churn(int r, int steps, unsigned seed)
{
	struct region *reg = &regions[r];
	long *book = malloc(reg->pages * sizeof(*book));

	for (long i = 0; i < reg->pages; i++)
		book[i] = i;
	for (int s = 0; s < steps; s++) {
		long n = 1 + rand_r(&seed) % 32;
		long from = rand_r(&seed) % (reg->pages - n);
		char *at = reg->at + from * PAGE;

		switch (rand_r(&seed) % 8) {
		case 0:
			if (madvise(at, n * PAGE, MADV_DONTNEED) == 0)
				for (long i = from; i < from + n; i++)
					book[i] = -1;
			break;
		case 1: /* a hole, and new memory there */
			munmap(at, n * PAGE);
			mmap(at, n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
			for (long i = from; i < from + n; i++)
				book[i] = -1;
			break;
		case 2: { /* move */
			long to = rand_r(&seed) % (reg->pages - n);
			char *there = reg->at + to * PAGE;
			int moved;

			if (labs(to - from) < n)
				break;
			moved = mremap(at, n * PAGE, n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, there) != MAP_FAILED;
			if (!moved) /* across areas; some may have moved all the same */
				mmap(there, n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
			mmap(at, n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
			for (long i = 0; i < n; i++) {
				book[to + i] = moved ? book[from + i] : -1;
				book[from + i] = -1;
			}
			break;
		}
		case 3: /* split areas */
			mprotect(at, n * PAGE, PROT_READ);
			break;
		case 4:
			mprotect(at, n * PAGE, PROT_READ | PROT_WRITE);
			break;
		case 5: { /* a child sees the same */
			pid_t pid = fork();
			int status = 0;

			if (pid == 0) {
				for (long i = from; i < from + n; i++) {
					uint64_t *w = (uint64_t *)(reg->at + i * PAGE);

					if (w[7] != (book[i] == -1 ? 0 : word(r, book[i], 7)))
						_exit(1);
				}
				_exit(0);
			}
			if (waitpid(pid, &status, 0) != pid || status != 0)
				return from;
			break;
		}
		default:
			for (long i = from; i < from + n; i++) {
				uint64_t *w = (uint64_t *)(reg->at + i * PAGE);

				if (w[3] != (book[i] == -1 ? 0 : word(r, book[i], 3)))
					return i;
			}
		}
	}
	for (long i = 0; i < reg->pages; i++) {
		uint64_t *w = (uint64_t *)(reg->at + i * PAGE);

		for (unsigned long k = 0; k < WORDS; k++)
			if (w[k] != (book[i] == -1 ? 0 : word(r, book[i], k)))
				return i;
	}
	free(book);
	return -1;
}

static FILE *in, *out;

static void serve(const char *name);

/* What a command does; its answer goes to `out`. */
static void command(char *line)
{
	char verb[32], name[32] = "";
	long a = 0, b = 0, c = 0, d = 0, bad = -1;
	int n = sscanf(line, "%31s %ld %ld %ld %ld", verb, &a, &b, &c, &d);
	struct region *r = a >= 0 && a < REGIONS ? &regions[a] : NULL;
	char *at = r && r->at ? r->at + b * PAGE : NULL;
	int rc = 0;

	(void)n;
	if (!strcmp(verb, "map")) { /* REGION PAGES */
		r->pages = b;
		r->at = mmap(NULL, b * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		rc = r->at == MAP_FAILED ? -1 : 0;
	} else if (!strcmp(verb, "fill")) { /* REGION FROM N */
		fill(a, b, c);
	} else if (!strcmp(verb, "stripe")) { /* REGION: areas of one page, every other read-only; EVERY */
		for (long p = 0; p < r->pages && rc == 0; p += 2 * b)
			rc = mprotect(r->at + p * PAGE, b * PAGE, PROT_READ);
	} else if (!strcmp(verb, "check")) { /* REGION FROM N AS */
		bad = wrong(a, d ? d : a, b, c, 0);
	} else if (!strcmp(verb, "every")) { /* REGION N: a word of every Nth page */
		for (long p = 0; p < r->pages && bad < 0; p += b)
			if (*(volatile uint64_t *)(r->at + p * PAGE) != word(a, p, 0))
				bad = p;
	} else if (!strcmp(verb, "zero")) { /* REGION FROM N */
		bad = wrong(a, a, b, c, 1);
	} else if (!strcmp(verb, "advise")) { /* REGION FROM N ADVICE */
		rc = madvise(at, c * PAGE, d);
	} else if (!strcmp(verb, "protect")) { /* REGION FROM N PROT */
		rc = mprotect(at, c * PAGE, d);
	} else if (!strcmp(verb, "unmap")) { /* REGION FROM N */
		rc = munmap(at, c * PAGE);
	} else if (!strcmp(verb, "move")) { /* REGION FROM N TO-REGION: to the same place there */
		regions[d].at = mmap(NULL, r->pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		regions[d].pages = r->pages;
		rc = mremap(at, c * PAGE, c * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, regions[d].at + b * PAGE) == MAP_FAILED;
	} else if (!strcmp(verb, "lock")) { /* REGION FROM N */
		rc = mlock(at, c * PAGE);
	} else if (!strcmp(verb, "threads")) { /* REGION N */
		bad = threads(a, b);
	} else if (!strcmp(verb, "churn")) { /* REGION STEPS SEED */
		bad = churn(a, b, c);
	} else if (!strcmp(verb, "spin")) { /* N threads that need CPU, for ever */
		for (long i = 0; i < a; i++)
			if (fork() == 0)
				for (;;)
					;
	} else if (!strcmp(verb, "fork")) { /* N: a child that serves the pipes cN */
		snprintf(name, sizeof(name), "c%ld", a);
		pid_t pid = fork();

		if (pid == 0) {
			serve(name);
			_exit(0);
		}
		rc = pid < 0 ? -1 : 0;
	} else if (!strcmp(verb, "exit")) {
		_exit(a);
	} else {
		rc = -1;
		errno = ENOSYS;
	}
	if (rc != 0)
		fprintf(out, "error %s\n", strerror(errno));
	else if (bad >= 0)
		fprintf(out, "wrong %ld\n", bad);
	else
		fprintf(out, "ok\n");
	fflush(out);
}

static void serve(const char *name)
{
	char path[512], line[256];

	snprintf(path, sizeof(path), "%s/%s.in", dir, name);
	in = fdopen(open(path, O_RDWR), "r");
	snprintf(path, sizeof(path), "%s/%s.out", dir, name);
	out = fdopen(open(path, O_RDWR), "w");
	if (!in || !out)
		_exit(9);
	while (fgets(line, sizeof(line), in))
		command(line);
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	dir = argv[1];
	serve(argv[2]);
	return 0;
}
