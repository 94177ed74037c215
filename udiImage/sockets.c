/* Linked into every program of udiImage, by `-Wl,--wrap=connect,--wrap=accept`: no patch of OpenSSH is needed.
 *
 * TCP_NODELAY on every TCP socket, from its first byte. OpenSSH sets it only on interactive sessions, and late: key
 * exchange and authentication are small packets in turn, of which several wait for the peer's delayed acknowledgement,
 * 40 ms each (Nagle).
 *
 * And libcrypto reads no configuration. Programs of udiImage run in images: an image's openssl.cnf, or OPENSSL_CONF of
 * its environment, could name modules, which a static program would load from the image. */

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

/* The linker's names: it turns a call of connect into one of __wrap_connect, and __real_connect into libc's. */
int real_connect(int fd, const struct sockaddr *address, socklen_t length) __asm__("__real_connect");
int real_accept(int fd, struct sockaddr *address, socklen_t *length) __asm__("__real_accept");
int wrap_connect(int fd, const struct sockaddr *address, socklen_t length) __asm__("__wrap_connect");
int wrap_accept(int fd, struct sockaddr *address, socklen_t *length) __asm__("__wrap_accept");

/* Fails on a socket that is not TCP's, and that is right. */
static void no_delay(int fd)
{
	int on = 1;
	(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

int wrap_connect(int fd, const struct sockaddr *address, socklen_t length)
{
	no_delay(fd);
	return real_connect(fd, address, length);
}

int wrap_accept(int fd, struct sockaddr *address, socklen_t *length)
{
	int connection = real_accept(fd, address, length);
	if (connection >= 0)
		no_delay(connection);
	return connection;
}

/* libcrypto's, of its ABI: OPENSSL_INIT_NO_LOAD_CONFIG. Weak: what has no libcrypto is not given one. */
enum { NO_LOAD_CONFIG = 0x80 };
__attribute__((weak)) int OPENSSL_init_crypto(uint64_t options, const void *settings);

__attribute__((constructor)) static void no_configuration(void)
{
	if (OPENSSL_init_crypto)
		(void)OPENSSL_init_crypto(NO_LOAD_CONFIG, NULL);
}
