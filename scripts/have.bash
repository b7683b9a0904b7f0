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

# Is there somebody else's FAT to hold ours against? Its tools stand where only root
# looks.
have_fat_tools() {
	[ -x /usr/sbin/mkfs.vfat ] && [ -x /usr/sbin/fsck.vfat ] && command -v mcopy >/dev/null
}

# Can it check systemd's units?
have_unit_check() {
	command -v systemd-analyze
}

# Can it run whole arm64 machines, and read their disks? That takes QEMU, a UEFI for
# its machines, mtools for FAT and e2fsprogs for ext4.
have_machines() {
	local uefi
	command -v qemu-system-aarch64 >/dev/null && command -v mcopy >/dev/null && [ -x /usr/sbin/debugfs ] || return 1
	for uefi in /usr/share/qemu-efi-aarch64/QEMU_EFI.fd /usr/share/AAVMF/AAVMF_CODE.fd /usr/share/edk2/aarch64/QEMU_EFI.fd; do
		[ ! -e "$uefi" ] || return 0
	done
	return 1
}

# Can it make a file system on a disk of ours, whose writes we see? That takes
# qemu-storage-daemon, the kernel's FUSE and loop devices, and e2fsprogs.
have_recorded_disks() {
	command -v qemu-storage-daemon >/dev/null && [ -c /dev/fuse ] && [ -c /dev/loop-control ] && [ -x /usr/sbin/mke2fs ]
}

# Can it make the image? That takes apt, dpkg-deb and the keys of Debian.
have_image_tools() {
	command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null && [ -e /usr/share/keyrings/debian-archive-keyring.gpg ]
}

# May it mount, and boot a systemd of its own? Root in a container often may not.
may_mount() {
	[ "$(id -u)" -eq 0 ] && unshare --mount mount -t tmpfs tmpfs /mnt 2>/dev/null
}

# Can it check Debian packages and live through their life?
have_deb_tools() {
	local p
	for p in lintian systemd-nspawn udevadm umockdev-run; do
		command -v $p >/dev/null || return 1
	done
}

# Can it hold what the guests make to what others make of the same?
have_guest_tools() {
	local p
	for p in gawk sqlite3 jq exiftool convert; do
		command -v $p >/dev/null || return 1
	done
}

# Prints a clang that makes WebAssembly with WASI's libc; the name differs between
# releases. That there is a clang does not tell: linker, libc and run-time are others'
# packages.
wasm_clang() {
	local cc
	for cc in clang $(compgen -c clang- | grep -x 'clang-[0-9]*' | sort -u -t- -k2nr); do
		command -v "$cc" >/dev/null || continue
		echo '#include <stdio.h>
			int main(void) { puts(""); return 0; }' |
			"$cc" --target=wasm32-wasi -x c - -o /dev/null 2>/dev/null || continue
		echo "$cc"
		return
	done
	return 1
}
