#compdef shifter shifterimg shifterctl setupRoot unsetupRoot
# zsh completion for shifter, shifterimg, shifterctl, setupRoot and unsetupRoot

# The images that the user may use: the first column of "shifterimg images" without its head.
_shifter_images() {
    local -a images
    images=(${(f)"$(_call_program images shifterimg images 2>/dev/null)"})
    images=(${(M)${images%% *}:#*:*})
    compadd "$@" -- $images
}

_shifter_run() {
    _arguments -s -S \
        '(- : *)'{-h,--help}'[show help]' \
        '(- : *)--version[show the version]' \
        {-v,--verbose}'[say what is done]' \
        '(-i --image)'{-i+,--image=}'[run in this image]:image:_shifter_images' \
        '*'{-V+,--volume=}'[mount a directory]:from\:to[\:ro]:_directories' \
        '(--entrypoint --entry)--entrypoint=-[run the entry point of the image, or a command in its place]::command:_files' \
        '(--entrypoint --entry)--entry=-[same as --entrypoint]::command:_files' \
        '(-w --workdir)'{-w-,--workdir=-}'[start in a directory]::directory:_directories' \
        '(-m --module)'{-m+,--module=}'[use site modules]:modules:(none)' \
        '*'{-e+,--env=}'[set an environment variable]:NAME=VALUE:_parameters -g "*export*" -qS=' \
        '--env-file=[set environment variables from a file]:file:_files' \
        '(-E --clearenv)'{-E,--clearenv}'[start from an empty environment]' \
        '(-):command:_command_names -e' \
        '*::arguments:_normal'
}

_shifter_img() {
    local curcontext=$curcontext state line
    local -A opt_args
    _arguments -C \
        '(- : *)--help[show help]' '(- : *)--version[show the version]' \
        '1:command:((import\:"make an image" images\:"list images" lookup\:"print an identifier"
            inspect\:"show what is known" rm\:"remove an image"))' \
        '*::argument:->argument'
    [[ $state == argument ]] || return
    case $line[1] in
        import)
            _arguments '--format[format of the image file]:format:(squashfs erofs)' \
                '--user[users who may run it]:users:_users' '--group[groups that may run it]:groups:_groups' \
                '1:source:_files' '2:image:_shifter_images'
            ;;
        images) _arguments '--json[print JSON]' ;;
        inspect) _arguments '--json[print JSON]' '1:image:_shifter_images' ;;
        lookup | rm) _arguments '1:image:_shifter_images' ;;
    esac
}

_shifter_ctl() {
    local curcontext=$curcontext state line
    local -A opt_args
    _arguments -C \
        '(- : *)'{-h,--help}'[show help]' '(- : *)--version[show the version]' \
        '1:command:((config\:"check or show udiRoot.conf" gc\:"take down what is idle" ps\:"list UDIs"
            plan\:"show what a launch would do"
            doctor\:"look at Slurm on this node"
            logs\:"show what the sshd of a job said"
            release\:"take down what holds a path"
            udi-image\:"show the OpenSSH for containers"))' \
        '*::argument:->argument'
    [[ $state == argument ]] || return
    case $line[1] in
        gc) _arguments '--all[everything]' '--keep-images[leave images mounted]' ;;
        ps) _arguments '--json[print JSON]' '--path[only UDIs that hold it]:path:_files' ;;
        logs) _arguments '--job[of this job]:job:_shifter_jobs' ;;
        doctor) _arguments '--slurm[look at Slurm]' '--quiet[only what is wrong]' ;;
        plan | udi-image) _arguments '--json[print JSON]' ;;
        release) _arguments '1:path:_directories' ;;
        config) _arguments '--json[print JSON]' '1:command:((check\:"print faults" show\:"print values and origins"))' '2:file:_files' ;;
    esac
}

# The jobs that are set up on this node.
_shifter_jobs() {
    compadd "$@" -- ${(f)"$(_call_program jobs ls /run/shifter/jobs 2>/dev/null)"}
}

# The image of a job: what stands before it is its type.
_shifter_tags() {
    local type=${words[CURRENT - 1]}
    local -a images
    [[ $type == local ]] && { _directories; return }
    images=(${(f)"$(_call_program images shifterimg images 2>/dev/null)"})
    images=(${(M)${images%% *}:#$type:*})
    compadd "$@" -- ${images#$type:}
}

_shifter_setup() {
    _arguments -s -S \
        '(- : *)'{-h,--help}'[show help]' \
        '(- : *)--version[show the version]' \
        '(-u --user)'{-u+,--user=}'[user of the job]:user:_users' \
        '(-U --uid)'{-U+,--uid=}"[the user's id]:uid" \
        '(-G --gid)'{-G+,--gid=}'[group of the job]:gid' \
        '*'{-v+,--volume=}'[mount a directory]:from\:to[\:ro]:_directories' \
        '(-m --module)'{-m+,--module=}'[use site modules]:modules:(none)' \
        '(-N --node-spec)'{-N+,--node-spec=}"[the job's nodes]:HOST/TASKS:_hosts -S/" \
        '--nodes=[nodes from a file]:file:_files' \
        '--job=[id of the job]:job:_shifter_jobs' \
        '--restart=[how often it was restarted]:number' \
        '(--no-sshd)--sshd[an sshd runs in the UDI]' \
        '(--sshd)--no-sshd[none does]' \
        '*'{-s+,--key=}'[further public key]:key' \
        '--authorize=[further public keys from a file]:file:_files' \
        '(-V --verbose)'{-V,--verbose}'[say what was done]' \
        '--json[print JSON]' \
        '--from-json=[all about the job from a file]:file:_files' \
        '1:type:(docker custom id local)' \
        '2:image:_shifter_tags'
}

_shifter_unsetup() {
    _arguments -s -S \
        '(- : *)'{-h,--help}'[show help]' \
        '(- : *)--version[show the version]' \
        '--job=[id of the job]:job:_shifter_jobs' \
        '--json[print JSON]'
}

case $service in
    shifter) _shifter_run ;;
    shifterimg) _shifter_img ;;
    shifterctl) _shifter_ctl ;;
    setupRoot) _shifter_setup ;;
    unsetupRoot) _shifter_unsetup ;;
esac
