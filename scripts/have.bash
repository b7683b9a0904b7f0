# Sourced by the other scripts: what this machine can do.

# Can it build with the race detector? That takes a C compiler and libc's headers.
have_race() {
	echo '#include <stdlib.h>' | gcc -fsyntax-only -x c - 2>/dev/null
}

# Prints the emulator for arm64 programs; the name differs between releases.
qemu_arm64() {
	command -v qemu-aarch64-static || command -v qemu-aarch64
}

# Prints Mosquitto, the broker that the agent's session is tested against; it
# stands where only root looks.
mosquitto_broker() {
	command -v mosquitto || PATH=$PATH:/usr/sbin:/usr/local/sbin command -v mosquitto
}
