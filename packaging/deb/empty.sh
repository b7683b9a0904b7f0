# Part of each postrm: the script build puts it in where @EMPTY@ stands.

# empty FOLDER USER: removes a state folder with all that is in it, but nothing that
# is mounted there, also of the same file system, which rm does not tell from its own.
# Where FOLDER is a link, what it leads to goes if it belongs to USER: it was
# given to it. Fails if anything is left.
empty() {
	mounts=$nl$(cut -d' ' -f5 /proc/self/mountinfo 2>/dev/null | sed 's/\\040/ /g')$nl
	folder=$(readlink -f "$1")
	if [ -d "$folder" ] && { [ ! -L "$1" ] || [ "$(stat -c %U "$folder")" = "$2" ]; }; then
		empty_below "$folder"
	fi
	[ ! -e "$folder" ] || return 1
	rm -f "$1"
}
nl='
'
empty_below() {
	for e in "$1"/* "$1"/.[!.]* "$1"/..?*; do
		[ ! -e "$e" ] && [ ! -L "$e" ] && continue
		case $mounts in
		*"$nl$e$nl"*) ;;
		*"$nl$e/"*) empty_below "$e" ;;
		*) rm -rf --one-file-system "$e" || true ;;
		esac
	done
	rmdir "$1" 2>/dev/null || true
}
