/*
 * Gives Node's OpenSSL a new seed each time it is loaded: process.dlopen calls
 * napi_register_module_v1 every time. No function of Node does it, and OpenSSL by
 * itself only when it sees another process id, which a clone has not.
 *
 * Node and libcrypto.so export what is needed, so there are no headers, and no C
 * library: one file serves glibc and musl.
 */
extern int RAND_poll(void);
extern int napi_throw_error(void *env, const char *code, const char *msg);

void *napi_register_module_v1(void *env, void *exports) {
	if (RAND_poll() != 1)
		napi_throw_error(env, "ERR_CRAC_RESEED", "RAND_poll failed: OpenSSL has no new seed");
	return exports;
}
