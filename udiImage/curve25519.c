/* Linked, with libsodium, into every program of udiImage: no patch of OpenSSH is needed.
 *
 * OpenSSH computes on Curve25519 with portable code of its own, also where it has libcrypto: 2.4 ms for X25519 and 1.7 ms to
 * verify an Ed25519 signature, where libsodium takes 0.05 (measured on one machine), and a login needs four of the one and
 * five of the other. libsodium's functions have the very names and parameters that OpenSSH took over from NaCl, so the
 * linker takes them, if it finds them first; the rest of what tells them apart is here. */

#include <string.h>

/* The linker's names: see sockets.c. */
int real_scalarmult(unsigned char *q, const unsigned char *n, const unsigned char *p) __asm__("__real_crypto_scalarmult_curve25519");
int wrap_scalarmult(unsigned char *q, const unsigned char *n, const unsigned char *p) __asm__("__wrap_crypto_scalarmult_curve25519");

/* libsodium refuses a point of small order by its return value; OpenSSH looks for zeros in the result (RFC 8731, section 3). */
int wrap_scalarmult(unsigned char *q, const unsigned char *n, const unsigned char *p)
{
	int status = real_scalarmult(q, n, p);
	if (status != 0)
		memset(q, 0, 32);
	return status;
}
