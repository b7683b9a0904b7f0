//go:build wasip1

// Command hosted is a guest that uses the host interface and its files, well and ill.
package main

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"time"
	"unsafe"
)

//go:wasmimport deimos_v1 progress
func progress(permille int32)

//go:wasmimport deimos_v1 checkpoint
func checkpoint(ptr, length uint32) uint32

//go:wasmimport deimos_v1 restore
func restore(ptr, capacity uint32) int32

//go:wasmimport deimos_v1 should_checkpoint
func shouldCheckpoint() int32

//go:wasmimport deimos_v1 input_size
func inputSize(name, nameLen uint32) int64

//go:wasmimport deimos_v1 input_read
func inputRead(name, nameLen uint32, offset int64, ptr, length uint32) int32

//go:wasmimport deimos_v1 sha256
func sha256(ptr, length, out uint32)

//go:wasmimport deimos_v1 log
func log(level int32, ptr, length uint32)

func at(b []byte) uint32     { return uint32(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) }
func keep(b []byte) uint32   { return checkpoint(at(b), uint32(len(b))) }
func size(name string) int64 { return inputSize(at([]byte(name)), uint32(len(name))) }
func say(level int32, text string) {
	b := []byte(text)
	log(level, at(b), uint32(len(b)))
}
func read(name string, offset int64, p []byte) int32 {
	return inputRead(at([]byte(name)), uint32(len(name)), offset, at(p), uint32(len(p)))
}

func restored() []byte {
	n := restore(0, 0)
	if n < 0 {
		return nil
	}
	b := make([]byte, n)
	if restore(at(b), uint32(n)) != n {
		panic("the checkpoint has changed")
	}
	return b
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func main() {
	arg := func(i int) int64 { n, _ := strconv.ParseInt(os.Args[i], 0, 64); return n }
	switch os.Args[1] {
	case "copy": // inputs to outputs of the same names, and what is in the folders
		for _, name := range os.Args[2:] {
			in, err := os.Open("/in/" + name)
			check(err)
			st, err := in.Stat()
			check(err)
			out, err := os.Create("/out/" + name)
			check(err)
			n, err := io.Copy(out, in)
			check(err)
			check(out.Close())
			fmt.Println(name, n, st.Size(), st.Mode(), st.ModTime().UnixNano())
		}
		for _, dir := range []string{"/in", "/out"} {
			entries, err := os.ReadDir(dir)
			check(err)
			for _, e := range entries {
				fmt.Println(dir, e.Name(), e.IsDir())
			}
		}
	case "walk": // all that there is to read: standard input, and each file in its folder
		whole, err := io.ReadAll(os.Stdin)
		check(err)
		fmt.Printf("stdin %d %q\n", len(whole), whole[:min(len(whole), 20)])
		check(fs.WalkDir(os.DirFS("/in"), ".", func(path string, e fs.DirEntry, err error) error {
			check(err)
			info, err := os.Stat("/in/" + path)
			check(err)
			if e.IsDir() != info.IsDir() {
				fmt.Println(path, "is a folder once, and once not")
			}
			if e.IsDir() {
				fmt.Println(path + "/")
				return nil
			}
			whole, err := os.ReadFile("/in/" + path)
			check(err)
			if n := size(path); n != int64(len(whole)) || n != info.Size() {
				fmt.Println(path, "has", n, "and", info.Size(), "bytes")
			}
			fmt.Printf("%s %q\n", path, whole)
			return nil
		}))
	case "spoil": // what a folder of inputs must refuse
		could := func(what string, err error) {
			if err == nil {
				fmt.Println("could:", what)
			}
		}
		for _, path := range []string{"/in/d/../../secret", "/in/d/../../../etc/passwd", "/in/d/sub/../../../etc/passwd", "/in/d/x/", "/in/d/x/y", "/in/d/sub/..", "/in/d"} {
			_, err := os.ReadFile(path)
			could("read "+path, err)
		}
		could("write", os.WriteFile("/in/d/x", nil, 0o600))
		could("make a file", os.WriteFile("/in/d/new", nil, 0o600))
		could("make a folder", os.Mkdir("/in/d/new", 0o700))
		could("remove a file", os.Remove("/in/d/x"))
		could("remove a folder", os.RemoveAll("/in/d/sub"))
		could("rename", os.Rename("/in/d/x", "/in/d/y"))
		could("link", os.Symlink("/etc/passwd", "/in/d/link"))
		could("truncate", os.Truncate("/in/d/x", 0))
		could("change times", os.Chtimes("/in/d/x", time.Now(), time.Now()))
		if size("d") >= 0 || size("d/") >= 0 || size("d/../d/x") >= 0 {
			fmt.Println("could: read a folder, or by a path that is none")
		}
	case "read": // parts of an input by the host's function
		whole := make([]byte, size("a"))
		fmt.Println(len(whole), read("a", 0, whole), size("b"), size("../a"), size("a/"), size(""), size("stdin"))
		part := make([]byte, 10)
		fmt.Println(read("a", int64(len(whole))-4, part), read("a", int64(len(whole)), part), read("a", 1<<62, part), read("a", -1, part), read("b", 0, part))
		os.Stdout.Write(whole)
	case "sha256":
		data, sum := bytes.Repeat([]byte("deimos"), 100_000), make([]byte, 32)
		sha256(at(data), uint32(len(data)), at(sum))
		fmt.Println(hex.EncodeToString(sum))
	case "tell":
		for _, p := range []int32{-5, 1, 1, 500, 20, 501, 70_000, 1000} {
			progress(p)
		}
		say(0, "quiet")
		say(99, "loud \xff\n")
		say(-7, "strange")
	case "flood": // messages and progress without an end
		for i := int32(0); i < 200_000; i++ {
			progress(i)
			say(1, "the same again and again and again and again and again")
		}
		say(3, string(make([]byte, 1<<20)))
	case "fault": // a range outside of the memory
		ptr, length := uint32(arg(3)), uint32(arg(4))
		b := make([]byte, 64)
		switch os.Args[2] {
		case "checkpoint":
			checkpoint(ptr, length)
		case "restore":
			restore(ptr, length)
		case "input_size":
			inputSize(ptr, length)
		case "input_read":
			inputRead(at([]byte("a")), 1, 0, ptr, length)
		case "input_read_name":
			inputRead(ptr, length, 0, at(b), 64)
		case "sha256":
			sha256(ptr, length, at(b))
		case "sha256_out":
			sha256(at(b), 64, ptr)
		case "log":
			log(1, ptr, length)
		}
		fmt.Println("lives")
	case "count": // to so many, with a checkpoint at each; what it counted is the output
		n := int64(0)
		if b := restored(); b != nil {
			n, _ = strconv.ParseInt(string(b), 10, 64)
			fmt.Fprintln(os.Stderr, "went on at", n)
		}
		for ; n < arg(2); n++ {
			if errno := keep([]byte(strconv.FormatInt(n, 10))); errno != 0 {
				fmt.Fprintln(os.Stderr, "errno", errno)
				os.Exit(2)
			}
			if len(os.Args) > 3 && n == arg(3) {
				progress(500)
				for {
				}
			}
		}
		fmt.Println(n)
	case "steps": // as count, but with a checkpoint only when it is asked
		n := int64(0)
		if b := restored(); b != nil {
			n, _ = strconv.ParseInt(string(b), 10, 64)
			fmt.Fprintln(os.Stderr, "went on at", n)
		}
		for ; n < arg(2); n++ {
			progress(1)
			if shouldCheckpoint() != 0 {
				keep([]byte(strconv.FormatInt(n, 10)))
				for shouldCheckpoint() != 0 {
				}
			}
		}
		fmt.Println(n)
	case "long": // so many steps of some milliseconds, with a checkpoint now and then
		n, x := int64(0), uint64(1)
		if b := restored(); b != nil {
			if _, err := fmt.Sscan(string(b), &n, &x); err != nil {
				check(err)
			}
			fmt.Fprintln(os.Stderr, "went on at", n)
		}
		for ; n < arg(2); n++ {
			for range 1_000_000 {
				x = x*6364136223846793005 + 1442695040888963407 // Knuth's, as in MMIX
			}
			if n%25 == 0 || shouldCheckpoint() != 0 {
				if errno := keep(fmt.Appendln(nil, n+1, x)); errno != 0 {
					os.Exit(int(errno))
				}
			}
			progress(int32(n * 1000 / arg(2)))
		}
		fmt.Println(n, x)
	case "bombs": // checkpoints as large as they may be, and larger
		b := make([]byte, arg(2))
		fmt.Println(keep(b))
	case "many": // so many checkpoints of so many bytes
		b := make([]byte, arg(3))
		for range arg(2) {
			if errno := keep(b); errno != 0 {
				os.Exit(int(errno))
			}
		}
	case "asked": // runs until it is asked
		progress(1)
		for shouldCheckpoint() == 0 {
		}
		fmt.Println(keep([]byte("asked")))
	case "env":
		fmt.Printf("%q", os.Environ())
	case "live":
		fmt.Println(time.Now().Unix())
		b := make([]byte, 16)
		f := time.Now()
		time.Sleep(20 * time.Millisecond)
		fmt.Println(time.Since(f) >= 20*time.Millisecond)
		_ = b
	case "pour": // so many bytes to an output, in small pieces
		out, err := os.OpenFile("/out/a", os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		check(err)
		b := bytes.Repeat([]byte("x"), 1000)
		for left := arg(2); left > 0; left -= int64(len(b)) {
			_, err := out.Write(b[:min(left, int64(len(b)))])
			check(err)
		}
	case "neighbours": // what a job must not find that runs beside others
		if size("secret") >= 0 || read("secret", 0, make([]byte, 10)) >= 0 {
			fmt.Println("could: read another job's input by name")
		}
		for _, dir := range []string{"/in", "/out", "/", "/proc/self/fd", "/tmp"} {
			entries, _ := os.ReadDir(dir)
			for _, e := range entries {
				if dir != "/in" || e.Name() != "a" {
					fmt.Println("could: list", dir, e.Name())
				}
			}
		}
		for fd := 5; fd < 64; fd++ { // 3 and 4 are the folders
			p := make([]byte, 10)
			if f := os.NewFile(uintptr(fd), "fd"); f != nil {
				if n, err := f.Read(p); n > 0 || err == nil {
					fmt.Println("could: read descriptor", fd, p[:n])
				}
				if n, err := f.Write(p); n > 0 || err == nil {
					fmt.Println("could: write descriptor", fd)
				}
			}
		}
		if restored() != nil {
			fmt.Println("could: have another job's checkpoint")
		}
	case "escape":
		escape()
	}
}

// escape prints a line for each thing that is not refused.
func escape() {
	could := func(what string, err error) {
		if err == nil {
			fmt.Println("could:", what)
		}
	}
	for _, path := range []string{
		"/in/../etc/passwd", "/in/..", "/in/../../../etc/passwd", "/in/a/../../etc/passwd", "/in/a/b", "/in/a/",
		"/in/b", "/in/.", "/out/../in/a/x", "/out/b", "/in//../../etc/passwd", "/in/a\x00b", "/etc/passwd", "/proc/self/environ",
		"/in/link", "/out/link", "/in/../out/o",
	} {
		_, err := os.ReadFile(path)
		could("read "+path, err)
	}
	for _, path := range []string{"/in/a", "/in/new", "/out/new", "/out/../x", "/out/o/../../x", "/out/.", "/out/..", "/out/o/", "/tmp/x"} {
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644)
		if err == nil {
			_, err = f.Write([]byte("x"))
		}
		could("write "+path, err)
	}
	for _, flag := range []int{os.O_RDWR, os.O_APPEND | os.O_WRONLY, os.O_TRUNC | os.O_RDWR, os.O_EXCL | os.O_CREATE | os.O_RDWR} {
		_, err := os.OpenFile("/in/a", flag, 0)
		could(fmt.Sprint("open /in/a with ", flag), err)
	}
	for _, dir := range []string{"/in", "/out"} {
		could("mkdir in "+dir, os.Mkdir(dir+"/d", 0o755))
		could("symlink in "+dir, os.Symlink("/etc/passwd", dir+"/link"))
		could("hard link in "+dir, os.Link("/in/a", dir+"/hard"))
		could("readlink in "+dir, func() error { _, err := os.Readlink(dir + "/a"); return err }())
		could("remove in "+dir, os.Remove(dir+"/a"))
		could("remove o in "+dir, os.Remove(dir+"/o"))
		could("remove "+dir, os.Remove(dir))
		could("rename in "+dir, os.Rename(dir+"/a", dir+"/c"))
		could("list .. of "+dir, func() error { _, err := os.ReadDir(dir + "/.."); return err }())
	}
	could("rename out", os.Rename("/out/o", "/in/a"))
	could("times", os.Chtimes("/in/a", time.Now(), time.Now()))
	o, err := os.Create("/out/o")
	check(err)
	_, err = o.Write([]byte("abc"))
	check(err)
	_, err = o.WriteAt([]byte("z"), 0)
	could("write over what was written", err)
	_, err = o.Seek(0, io.SeekStart)
	could("go back", err)
	could("cut what was written", o.Truncate(0))
	could("lengthen what was written", o.Truncate(1<<40))
	_, err = o.Read(make([]byte, 1))
	could("read what was written", err)
	_, err = os.Create("/out/o")
	could("begin again", err)
	in, err := os.Open("/in/a")
	check(err)
	_, err = in.Write([]byte("x"))
	could("write to what is read", err)
	could("cut what is read", in.Truncate(0))
	n, err := in.ReadAt(make([]byte, 10), 1<<62)
	could(fmt.Sprint("read behind the end ", n), err)
	_, err = in.Seek(-1, io.SeekStart)
	could("go before the beginning", err)
}
