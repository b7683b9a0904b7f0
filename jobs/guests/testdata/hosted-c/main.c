/* Calls all of deimos.h and prints what came of it, the same as hosted-go of the Go
 * package. */
#include <stdio.h>
#include <string.h>

#include "deimos.h"

int main(void)
{
	char buf[64] = {0};
	uint8_t digest[32];
	deimos_progress(250);
	int32_t n = deimos_restore(NULL, 0);
	if (n < 0)
		puts("restored nothing");
	else if (n < (int32_t)sizeof buf && deimos_restore(buf, sizeof buf) == n)
		printf("restored %s\n", buf);
	deimos_log(DEIMOS_WARNING, "wärning", strlen("wärning"));
	printf("should checkpoint %s\n", deimos_should_checkpoint() ? "true" : "false");

	int64_t size = deimos_input_size("data", 4);
	memset(buf, 0, sizeof buf);
	if (deimos_input_read("data", 4, 3, buf, 5) != 5)
		return 1;
	printf("data has %lld bytes, at 3: %s\n", (long long)size, buf);
	n = deimos_input_read("data", 4, size - 2, buf, 5);
	printf("at its end %d %s\n", n, deimos_input_read("data", 4, size, buf, 5) == 0 ? "true" : "false");
	if (deimos_input_size("missing", 7) != -1 || deimos_input_read("missing", 7, 0, buf, 1) != -1)
		return 1;
	deimos_sha256("abc", 3, digest);
	printf("sha256 ");
	for (int i = 0; i < 32; i++)
		printf("%02x", digest[i]);
	puts("");

	FILE *r = fopen("/in/data", "rb"), *w = fopen("/out/copy", "ab");
	if (r == NULL || w == NULL)
		return 1;
	for (int c; (c = getc(r)) != EOF;)
		putc(c, w);
	if (fclose(w) != 0)
		return 1;

	printf("kept %s\n", deimos_checkpoint("first", 5) == DEIMOS_OK ? "true" : "false");
	printf("kept %s\n", deimos_checkpoint("second", 6) == DEIMOS_OK ? "true" : "false");
	deimos_progress(2000);
	return 0;
}
